use shadowbox_plugin::prelude::*;

#[derive(View)]
#[view(name = "optional")]
struct Optional {
    #[view(key)]
    id: Option<String>,
}

#[derive(View)]
#[view(name = "real")]
struct Real {
    #[view(key)]
    id: f64,
}

fn main() {}
