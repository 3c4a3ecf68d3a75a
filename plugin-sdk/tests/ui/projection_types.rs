use shadowbox_plugin::prelude::*;

#[derive(View, Default)]
#[view(name = "rows")]
struct Row {
    #[view(key)]
    id: String,
}

struct NotAView;

enum NotEvents {}

#[derive(Events)]
#[events(source = "orders")]
enum Fact {
    #[event("Placed")]
    Placed,
}

#[projection(name = "events", version = 1, views(Row))]
fn wrong_events(_event: Event<NotEvents>, _views: &mut Views) -> Result<()> {
    Ok(())
}

#[projection(name = "views", version = 1, views(NotAView))]
fn wrong_views(_event: Event<Fact>, _views: &mut Views) -> Result<()> {
    Ok(())
}

fn main() {}
