use shadowbox_plugin::prelude::*;

#[derive(View)]
#[view(name = "rows")]
struct NoKey {
    id: String,
}

#[derive(View)]
struct NoName {
    #[view(key)]
    id: String,
}

#[derive(View)]
#[view(name = "Rows")]
struct WrongName {
    #[view(key)]
    id: String,
}

#[derive(View)]
#[view(name = "rows")]
struct WrongColumn {
    #[view(key)]
    _id: String,
}

#[derive(View)]
#[view(name = "rows")]
struct Twice {
    #[view(key)]
    id: String,
    #[view(column = "id")]
    other: String,
}

#[derive(View)]
#[view(name = "rows", index(colour))]
struct WrongIndex {
    #[view(key)]
    id: String,
}

#[derive(View)]
#[view(name = "rows")]
struct Borrowed<'a> {
    #[view(key)]
    id: &'a str,
}

#[derive(View)]
#[view(name = "rows")]
enum NotAStruct {}

fn main() {}
