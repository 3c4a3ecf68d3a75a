//! `shadowbox plugin new` and `shadowbox plugin check`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::json;
use shadowbox::manifest::Manifest;

use super::Common;

#[derive(Subcommand)]
pub(super) enum Plugin {
    /// Make a crate that compiles to a projection and has a passing test
    New(New),
    /// Show what a module declares, or why it would be refused
    Check(Check),
}

#[derive(Args)]
pub(super) struct New {
    /// The projection's and the crate's name: a-z, 0-9 and -, beginning with a letter
    name: String,
    /// Where to make the crate [default: ./NAME]
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// The folder of the crate shadowbox-plugin [default: the one that this program was built beside]
    #[arg(long, value_name = "DIR")]
    sdk: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct Check {
    /// The module
    file: PathBuf,
    /// Print the manifest as JSON
    #[arg(long)]
    json: bool,
}

impl Plugin {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        match self {
            Plugin::New(new) => new.run(),
            Plugin::Check(check) => check.run(common).await,
        }
    }
}

macro_rules! template {
    ($file:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../plugin-sdk/template/", $file))
    };
}

/// Where each file of a new crate goes, and what is in it.
const TEMPLATE: [(&str, &str); 3] = [
    ("Cargo.toml", template!("Cargo.toml.template")),
    ("src/lib.rs", template!("src_lib.rs")),
    (".gitignore", template!("gitignore")),
];

impl New {
    fn run(self) -> Result<()> {
        let name = &self.name;
        let valid = name.len() <= 63
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        ensure!(valid, "{name:?} is not a name for a plugin; use up to 63 of a-z, 0-9 and -, beginning with a letter");
        let sdk = match &self.sdk {
            Some(sdk) => sdk.clone(),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin-sdk"),
        };
        let sdk = sdk.canonicalize().ok().filter(|sdk| sdk.join("Cargo.toml").exists());
        let Some(sdk) = sdk else {
            bail!("the crate shadowbox-plugin is not where it was; name its folder with --sdk");
        };
        let directory = self.path.clone().unwrap_or_else(|| name.into());
        ensure!(!directory.exists(), "{directory:?} exists already; choose another with --path");
        for (file, template) in TEMPLATE {
            let path = directory.join(file);
            let text = template
                .replace("{{name}}", name)
                .replace("{{view}}", &name.replace('-', "_"))
                .replace("{{sdk}}", &sdk.display().to_string());
            std::fs::create_dir_all(path.parent().expect("a file is in a folder"))
                .and_then(|()| std::fs::write(&path, text))
                .with_context(|| format!("cannot write {path:?}"))?;
        }
        let module = format!("target/wasm32-wasip2/release/{}.wasm", name.replace('-', "_"));
        say!("made {}; next:", directory.display());
        say!("  cd {}", directory.display());
        say!("  cargo test");
        say!("  cargo build --release --target wasm32-wasip2");
        say!("then copy {module} into the plugin folder of a running shadowbox");
        Ok(())
    }
}

impl Check {
    async fn run(self, common: &Common) -> Result<()> {
        let config = common.config(|_| {})?;
        let file = self.file.clone();
        // What a plugin prints is written by a call that blocks.
        let checked = tokio::task::spawn_blocking(move || shadowbox::plugin::check(&file, &config.sandbox)).await?;
        let (manifest, hash) = checked.with_context(|| format!("{} would be refused", self.file.display()))?;
        if self.json {
            let written: serde_json::Value = serde_json::from_str(&manifest.json)?;
            say_json!("{}", serde_json::to_string_pretty(&json!({ "module_hash": hash, "manifest": written }))?);
        } else {
            print(&manifest, &hash)?;
        }
        Ok(())
    }
}

fn print(manifest: &Manifest, hash: &str) -> Result<()> {
    say!("projection {}, version {}, module {hash}", manifest.projection, manifest.version);
    for source in &manifest.sources {
        let types = if source.types.is_empty() { "all events".to_owned() } else { source.types.join(", ") };
        say!("  reads {}: {types}", source.source);
    }
    for view in &manifest.views {
        say!("  view {}", view.name);
        for column in &view.columns {
            let key = if view.key.contains(&column.name) { ", key" } else { "" };
            let null = if column.nullable { ", may be null" } else { "" };
            say!("    {}: {}{key}{null}", column.name, column.kind.name());
        }
        for index in &view.indexes {
            say!("    index on {}", index.join(", "));
        }
    }
    Ok(())
}
