use shadowbox_plugin::prelude::*;

#[derive(TextEnum, Clone, Copy)]
enum Fields {
    Paid(i64),
}

#[derive(TextEnum, Clone, Copy)]
enum Twice {
    Paid,
    #[text("paid")]
    Settled,
}

fn main() {}
