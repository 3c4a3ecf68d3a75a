use shadowbox_plugin::prelude::*;

struct Money(i64);

#[derive(View)]
#[view(name = "rows")]
struct Row {
    #[view(key)]
    id: String,
    count: u64,
    price: Money,
}

fn main() {}
