//! `headworks plugin new`: creates a folder with a crate for a plugin.

use std::path::Path;

use anyhow::{Context, bail};

use super::output::Out;

/// Source of the README's plugin, which the workspace also builds.
const SOURCE: &str = include_str!("../../../examples/plugin-threshold/src/lib.rs");
const TARGET: &str = "wasm32-unknown-unknown";
const NAME_BYTES_MAX: usize = 64;

/// Creates `dir`, whose last part is the plugin's name. `sdk` is the folder of the SDK's sources.
pub fn new(dir: &Path, sdk: &Path, out: &mut Out) -> anyhow::Result<()> {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !is_crate_name(name) {
        bail!(
            "a plugin's name must have lower-case letters, digits and `-`, and begin with a letter, is \"{name}\""
        );
    }
    if dir.exists() {
        bail!("{} already exists: use another name, or remove it", dir.display());
    }
    for (file, text) in files(name, &sdk_path(sdk)?) {
        let path = dir.join(file);
        let folder = path.parent().context("it is in a folder")?;
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&path, text))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let shown = dir.display();
    let wasm = wasm(name);
    out.line(format!("made {shown}; once: rustup target add {TARGET}; then:"))?;
    out.line(format!("  cd {shown} && cargo build --release"))?;
    out.line(format!("  headworks plugin inspect {wasm}"))?;
    out.line(format!("copy it as NN-{name}.wasm into the plugins folder, NN for its place among the steps"))
}

fn is_crate_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn sdk_path(sdk: &Path) -> anyhow::Result<String> {
    let path = sdk.canonicalize().with_context(|| format!("cannot find the SDK at {}", sdk.display()))?;
    if !path.join("src/plugin/mod.rs").is_file() {
        bail!("{} is not the folder of the SDK: use `guest-sdk` in the sources of Headworks", sdk.display());
    }
    path.into_os_string().into_string().ok().context("the SDK's path is not UTF-8")
}

fn files(name: &str, sdk: &str) -> [(&'static str, String); 4] {
    let sdk = serde_json::Value::from(sdk);
    let manifest = format!(
        "[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
         description = \"Readings above a limit go to the route alert\"\npublish = false\n\n\
         [lib]\ncrate-type = [\"cdylib\"]\n\n\
         [dependencies]\nheadworks-guest = {{ path = {sdk} }}\n\n\
         [profile.release]\nlto = true\ncodegen-units = 1\npanic = \"abort\"\nstrip = true\n\n\
         # Of no workspace, wherever it lies.\n[workspace]\n"
    );
    let config = format!(
        "[build]\ntarget = \"{TARGET}\"\n\n\
         [target.{TARGET}]\nrustflags = [\"-Ctarget-feature=+simd128,+bulk-memory\"]\n"
    );
    let source = SOURCE.replace(
        "//! The plugin of the README: readings above a limit go to the route `alert`.",
        "//! Readings above a limit go to the route `alert`: a plugin to begin with.",
    );
    [
        ("Cargo.toml", manifest),
        (".cargo/config.toml", config),
        (".gitignore", "/target\n".to_owned()),
        ("src/lib.rs", source),
    ]
}

fn wasm(name: &str) -> String {
    format!("target/{TARGET}/release/{}.wasm", name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_plugin_is_a_crate_of_its_own_and_nothing_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-sdk");
        let dir = folder.path().join("check-limits");
        let out = &mut Out::stdout();
        new(&dir, &sdk, out).unwrap();
        let read = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap();
        let sdk = sdk.canonicalize().unwrap();
        let manifest = read("Cargo.toml");
        assert!(manifest.contains("name = \"check-limits\"") && manifest.contains(sdk.to_str().unwrap()));
        assert!(read(".cargo/config.toml").contains(TARGET));
        let source = read("src/lib.rs");
        assert!(source.contains("headworks_guest::plugin!(Threshold)") && !source.contains("README"));
        let error = new(&dir, &sdk, out).unwrap_err().to_string();
        assert!(error.contains("already exists"), "{error}");
        for name in ["Limits", "7-limits", "a.b", ".."] {
            assert!(new(&folder.path().join(name), &sdk, out).is_err(), "{name}");
        }
        assert!(new(&folder.path().join("other"), folder.path(), out).is_err(), "no SDK");
        assert!(!folder.path().join("other").exists());
    }
}
