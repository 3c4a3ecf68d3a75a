use shadowbox_plugin::prelude::*;

#[derive(View, Default)]
#[view(name = "optional")]
struct Optional {
    #[view(key)]
    id: Option<String>,
}

#[derive(View, Default)]
#[view(name = "real")]
struct Real {
    #[view(key)]
    id: f64,
}

fn main() {}
