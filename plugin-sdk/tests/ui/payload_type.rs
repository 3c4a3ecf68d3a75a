use shadowbox_plugin::prelude::*;

struct Placed {
    id: String,
}

#[derive(Events)]
#[events(source = "orders")]
enum Fact {
    #[event("Placed")]
    Placed(Placed),
}

fn main() {}
