//! The tutorial shows code of a real plugin, word by word.

#[test]
fn the_readme_shows_the_example_as_it_is() {
    let readme = include_str!("../../README.md");
    let example = include_str!("../../../example-plugins/order-summary/src/lib.rs");
    let shown: Vec<_> = readme.split("```rust,ignore\n").skip(1).filter_map(|part| part.split("```").next()).collect();
    assert!(shown.len() >= 5, "the tutorial has its code");
    for code in shown {
        assert!(example.contains(code), "the example does not have this code of the README:\n{code}");
    }
}
