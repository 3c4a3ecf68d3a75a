use shadowbox_plugin::prelude::*;

#[derive(Events)]
enum NoSource {
    #[event("Placed")]
    Placed,
}

#[derive(Events)]
#[events(source = "orders")]
enum NoEvent {
    Placed,
}

#[derive(Events)]
#[events(source = "orders")]
enum Twice {
    #[event("Placed")]
    Placed,
    #[event("Placed", source = "orders")]
    Again,
}

#[derive(Events)]
#[events(source = "orders")]
enum Fields {
    #[event("Placed")]
    Placed { id: String },
}

#[derive(Events)]
#[events(source = "orders")]
enum Globs {
    #[event("Order{Placed")]
    Placed,
}

#[derive(Events)]
#[events(source = "sensors/**")]
enum Sources {
    #[event("Read")]
    Read,
}

fn main() {}
