use shadowbox_plugin::prelude::*;

#[derive(View, Default)]
#[view(name = "rows")]
struct Row {
    #[view(key)]
    id: String,
}

#[derive(Events)]
#[events(source = "orders")]
enum Fact {
    #[event("Placed")]
    Placed,
}

#[projection(name = "no-views", version = 1)]
fn no_views(event: Event<Fact>, views: &mut Views) -> Result<()> {
    Ok(())
}

#[projection(name = "No Name", version = 1, views(Row))]
fn wrong_name(event: Event<Fact>, views: &mut Views) -> Result<()> {
    Ok(())
}

#[projection(name = "version", version = 0, views(Row))]
fn wrong_version(event: Event<Fact>, views: &mut Views) -> Result<()> {
    Ok(())
}

#[projection(name = "arguments", version = 1, views(Row))]
fn wrong_arguments(event: Event<Fact>, views: &Views) -> Result<()> {
    Ok(())
}

#[projection(name = "result", version = 1, views(Row))]
fn no_result(event: Event<Fact>, views: &mut Views) {}

#[projection(name = "waiting", version = 1, views(Row))]
async fn waiting(event: Event<Fact>, views: &mut Views) -> Result<()> {
    Ok(())
}

#[projection(name = "unasked", version = 1, views(Row))]
fn not_asked_for(event: Event<Fact>, views: &mut Views) -> Result<()> {
    if event.forgotten { views.delete::<Row>("1") } else { Ok(()) }
}

fn main() {}
