//! What the compiler says when a plugin is wrong, and that the template is right.

use std::path::Path;

/// Each file under `ui/` is one mistake, and the `.stderr` beside it what the author reads. After a change on purpose:
/// `TRYBUILD=overwrite cargo test -p shadowbox-plugin mistakes`.
#[test]
fn mistakes_are_explained_and_the_template_compiles() {
    let tests = trybuild::TestCases::new();
    // The compiler lists the types that would do, and features add to them.
    if !cfg!(any(feature = "uuid", feature = "decimal")) {
        tests.compile_fail("tests/ui/*.rs");
    }

    // What `shadowbox plugin new orders-view` writes, made into a program that runs its own tests.
    let template = include_str!("../../template/src_lib.rs");
    let plugin = template.replace("{{name}}", "orders-view").replace("{{view}}", "orders_view");
    let names = plugin.split("#[test]\n    fn ").skip(1).filter_map(|test| test.split_once('(')).map(|(name, _)| name);
    let calls: String = names.map(|name| format!("tests::{name}();")).collect();
    assert!(!calls.is_empty(), "the template has tests");
    let plugin = plugin.replace("#[cfg(test)]\n", "").replace("#[test]\n    fn", "pub fn");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("template.rs");
    std::fs::write(&file, format!("{plugin}\nfn main() {{ {calls} }}\n")).unwrap();
    tests.pass(file);
}

/// A sum that wraps is a false total that nobody hears of.
#[test]
fn modules_are_built_with_checks_for_overflow() {
    let template = include_str!("../../template/Cargo.toml.template");
    let workspace = include_str!("../../../Cargo.toml");
    for (manifest, profile) in [(template, "[profile.release]"), (workspace, "[profile.plugin]")] {
        let (_, rest) = manifest.split_once(profile).unwrap();
        let section = rest.split("\n[").next().unwrap();
        assert!(section.lines().any(|line| line == "overflow-checks = true"), "{profile} has no checks for overflow");
    }
}
