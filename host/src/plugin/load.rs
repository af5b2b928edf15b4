//! From a file's bytes to a component that may run here, or to a reason why not.
//!
//! A component is taken as it is; a core module with WIT metadata (what cargo
//! builds for wasm32-unknown-unknown) is made one. Exports say what it is,
//! imports what it wants; both are looked at before a compiler sees a byte.
//! Parsers recurse as deep as a file makes them, so [`Report::of`] runs in the
//! compiling child only (`compile.rs`).

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use wasmparser::{Encoding, Parser, Payload};
use wit_component::ComponentEncoder;

use super::host::printable;

const PACKAGE: &str = "headworks:plugin/";
/// The contract's major version that this host speaks.
const MAJOR: u64 = 1;
/// Interfaces of types only, and those whose functions are served.
const SERVED: [&str; 6] = ["types", "arena", "log", "metrics", "clock", "devices"];
/// In the contract, not served by this version of the host.
const LATER: [&str; 4] = ["state", "timers", "secrets", "http"];
/// Largest file that is read.
pub(super) const FILE_BYTES_MAX: u64 = 128 << 20;
/// Names of all imports and exports together.
const NAMES_BYTES_MAX: usize = 256 << 10;

/// What a file is, as the compiling child says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// `None` where that much could not be read.
    pub form: Option<Form>,
    /// Names of the component's own imports, printable.
    pub imports: Vec<String>,
    /// Names of its own exports, printable.
    pub exports: Vec<String>,
    /// How it wants its messages, or why it cannot run here.
    pub kind: Result<Kind, LoadError>,
}

/// How the file was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    Component,
    CoreModule,
}

/// How it wants its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `process(messages)`: a batch at a time.
    Batch,
    /// `process(message)`: one at a time.
    Message,
    /// No messages: it decides who may connect.
    Access,
}

/// Why a file is no plugin for this host. Each says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum LoadError {
    #[error("empty file: copy it again")]
    Empty,
    #[error(
        "not WebAssembly: starts with {0}, a plugin starts with \\0asm; text (.wat) must be assembled first"
    )]
    NotWasm(String),
    #[error("damaged or truncated: {0}; copy or build it again")]
    Damaged(String),
    #[error(
        "imports `{import}`: a core module may import the plugin contract only; {}",
        of_toolchain(import)
    )]
    Foreign { import: String },
    #[error(
        "a core module without WIT metadata: build it with the Headworks SDK, or make it a component (`wasm-tools component new`)"
    )]
    NoMetadata,
    #[error("cannot be made a component: {0}")]
    Encode(String),
    #[error("cannot be compiled: {0}")]
    Invalid(String),
    #[error("the names of its imports and exports have more than {} KiB", NAMES_BYTES_MAX >> 10)]
    Names,
    #[error("not a Headworks plugin: does not export {PACKAGE}lifecycle@1.x")]
    NoLifecycle,
    #[error("exports none of batch, message and access ({PACKAGE}batch@1.x ...): nothing to run")]
    NoKind,
    #[error("exports more than one of batch, message and access: export exactly one")]
    BothKinds,
    #[error("exports {0}: not served by this version of Headworks")]
    ExportLater(String),
    #[error("imports {0}: not served by this version of Headworks")]
    ImportLater(String),
    #[error(
        "imports {0}: WASI is not served yet; a plugin has no files, sockets or environment: in Rust, build for \
         wasm32-unknown-unknown; in JavaScript and Python, componentize with the option that stubs WASI; Go and \
         TinyGo cannot build without WASI"
    )]
    Wasi(String),
    #[error("imports {0}: unknown, plugins may import {PACKAGE}log, metrics, clock and devices")]
    Unknown(String),
    #[error("{0}: this host speaks version {MAJOR} of the plugin contract; build the plugin for it")]
    Version(String),
}

/// What to do about a core module's import, by the toolchain that makes it.
fn of_toolchain(import: &str) -> &'static str {
    match import.split('.').next() {
        Some("wasi_snapshot_preview1" | "wasi_unstable") => {
            "this is WASI preview 1: in Rust, build for wasm32-unknown-unknown; in C, without a libc that needs \
             WASI (-nostdlib); Go and TinyGo cannot build without WASI, which is not served yet"
        }
        Some("gojs" | "go") => {
            "this is Go for a JavaScript host (GOOS=js), which cannot be a plugin; WASI, which Go needs elsewhere, \
             is not served yet"
        }
        Some("env") if import == "env.abort" => {
            "this is AssemblyScript's abort: compile with `--use abort=` so that it is not imported, and embed the \
             contract's metadata (`wasm-tools component embed`)"
        }
        _ => {
            "build it with the Headworks SDK for wasm32-unknown-unknown, or as a component; an import from `env` is \
             most often a C function that was declared and never defined"
        }
    }
}

impl Report {
    /// Says what `file` is, and gives the component that it is or becomes; empty
    /// where it cannot run here.
    pub fn of(file: &[u8]) -> (Self, Cow<'_, [u8]>) {
        let mut report =
            Self { form: None, imports: Vec::new(), exports: Vec::new(), kind: Err(LoadError::NoKind) };
        let made = to_component(file).and_then(|(component, form)| {
            report.form = Some(form);
            report.kind = Ok(report.read(&component)?);
            Ok(component)
        });
        match made {
            Ok(component) => (report, component),
            Err(error) => (Self { kind: Err(error), ..report }, Cow::Borrowed(&[])),
        }
    }

    /// Reads the names of a component's own imports and exports; nested modules
    /// and components are walked over.
    fn read(&mut self, component: &[u8]) -> Result<Kind, LoadError> {
        let mut depth = 0_u32;
        let mut bytes = 0;
        let mut name = |name: &str| {
            bytes += name.len();
            if bytes <= NAMES_BYTES_MAX { Ok(printable(name)) } else { Err(LoadError::Names) }
        };
        for payload in Parser::new(0).parse_all(component) {
            match payload.map_err(damaged)? {
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::ComponentImportSection(imports) if depth == 0 => {
                    for import in imports {
                        self.imports.push(name(import.map_err(damaged)?.name.name)?);
                    }
                }
                Payload::ComponentExportSection(exports) if depth == 0 => {
                    for export in exports {
                        self.exports.push(name(export.map_err(damaged)?.name.name)?);
                    }
                }
                _ => {}
            }
        }
        self.imports.iter().try_for_each(|import| check_import(import))?;
        kind(&self.exports)
    }

    /// Imports that are served, and those that are not, each with the reason.
    pub fn granted_and_denied(&self) -> (Vec<String>, Vec<(String, String)>) {
        let mut granted = Vec::new();
        let mut denied = Vec::new();
        for import in &self.imports {
            match check_import(import) {
                Ok(()) => granted.push(import.clone()),
                Err(reason) => denied.push((import.clone(), reason.to_string())),
            }
        }
        (granted, denied)
    }
}

fn damaged(error: wasmparser::BinaryReaderError) -> LoadError {
    LoadError::Damaged(printable(&error.to_string()))
}

/// The component that `bytes` is or becomes.
fn to_component(bytes: &[u8]) -> Result<(Cow<'_, [u8]>, Form), LoadError> {
    if bytes.is_empty() {
        return Err(LoadError::Empty);
    }
    if !bytes.starts_with(b"\0asm") {
        if b"\0asm".starts_with(bytes) {
            return Err(LoadError::Damaged("shorter than a header".into()));
        }
        let start: Vec<_> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
        return Err(LoadError::NotWasm(start.join(" ")));
    }
    match check_structure(bytes)? {
        Encoding::Component => Ok((Cow::Borrowed(bytes), Form::Component)),
        Encoding::Module => Ok((Cow::Owned(encode(bytes)?), Form::CoreModule)),
    }
}

/// Walks all sections, so that a truncated file is called that.
fn check_structure(bytes: &[u8]) -> Result<Encoding, LoadError> {
    let mut outermost = None;
    for payload in Parser::new(0).parse_all(bytes) {
        match payload {
            Ok(Payload::Version { encoding, .. }) => outermost = outermost.or(Some(encoding)),
            Ok(_) => {}
            Err(error) => return Err(damaged(error)),
        }
    }
    outermost.ok_or_else(|| LoadError::Damaged("no header".into()))
}

fn encode(module: &[u8]) -> Result<Vec<u8>, LoadError> {
    let mut has_metadata = false;
    let mut foreign = BTreeSet::new();
    for payload in Parser::new(0).parse_all(module) {
        match payload.map_err(damaged)? {
            Payload::CustomSection(section) => has_metadata |= section.name().starts_with("component-type"),
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import.map_err(damaged)?;
                    // Components' names have a colon; `env`, `wasi_snapshot_preview1` and the like have none.
                    if !import.module.contains(':') && !import.module.starts_with("cm32p2") {
                        foreign.insert(printable(&format!("{}.{}", import.module, import.name)));
                    }
                }
            }
            _ => {}
        }
    }
    if let Some(import) = foreign.into_iter().next() {
        return Err(LoadError::Foreign { import });
    }
    if !has_metadata {
        return Err(LoadError::NoMetadata);
    }
    ComponentEncoder::default()
        .validate(true)
        .module(module)
        .and_then(|mut encoder| encoder.encode())
        .map_err(|error| LoadError::Encode(printable(&format!("{error:#}"))))
}

fn check_import(import: &str) -> Result<(), LoadError> {
    let Some(interface) = import.strip_prefix(PACKAGE) else {
        return Err(if import.starts_with("wasi:") {
            LoadError::Wasi(import.to_owned())
        } else {
            LoadError::Unknown(import.to_owned())
        });
    };
    let name = versioned(interface).ok_or_else(|| LoadError::Version(import.to_owned()))?;
    if SERVED.contains(&name) {
        Ok(())
    } else if LATER.contains(&name) {
        Err(LoadError::ImportLater(import.to_owned()))
    } else {
        Err(LoadError::Unknown(import.to_owned()))
    }
}

fn kind(exports: &[String]) -> Result<Kind, LoadError> {
    let mut names = Vec::new();
    for export in exports {
        if let Some(interface) = export.strip_prefix(PACKAGE) {
            names.push(versioned(interface).ok_or_else(|| LoadError::Version(export.clone()))?);
        }
    }
    let has = |name| names.contains(&name);
    if !has("lifecycle") {
        return Err(LoadError::NoLifecycle);
    }
    if let Some(later) = ["timer-handler", "migration"].into_iter().find(|name| has(name)) {
        return Err(LoadError::ExportLater(format!("{PACKAGE}{later}")));
    }
    match (has("batch"), has("message"), has("access")) {
        (true, false, false) => Ok(Kind::Batch),
        (false, true, false) => Ok(Kind::Message),
        (false, false, true) => Ok(Kind::Access),
        (false, false, false) => Err(LoadError::NoKind),
        _ => Err(LoadError::BothKinds),
    }
}

/// `log@1.2.0` is `log`, when its version is compatible by semver.
fn versioned(interface: &str) -> Option<&str> {
    let (name, version) = interface.split_once('@')?;
    let major = version.split('.').next()?.parse::<u64>().ok()?;
    (major == MAJOR).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::super::test_plugins::{embed, guarded, message_plugin};
    use super::*;

    fn refused(bytes: &[u8]) -> String {
        Report::of(bytes).0.kind.unwrap_err().to_string()
    }

    #[test]
    fn a_core_module_with_metadata_and_the_component_made_of_it_both_load() {
        let file = guarded();
        let (module, component) = Report::of(&file);
        assert_eq!((module.form, module.kind), (Some(Form::CoreModule), Ok(Kind::Batch)));
        assert!(module.imports.contains(&"headworks:plugin/log@1.0.0".to_owned()), "{:?}", module.imports);
        let (again, same) = Report::of(&component);
        assert_eq!((again.form, again.kind), (Some(Form::Component), Ok(Kind::Batch)));
        assert!(same == component);
        assert_eq!(Report::of(&message_plugin()).0.kind, Ok(Kind::Message));
    }

    #[test]
    fn what_is_no_plugin_is_refused_by_name() {
        let wat = |text: &str| wat::parse_str(text).unwrap();
        assert!(refused(b"").contains("empty"));
        assert!(refused(b"\x7fELF....").contains("not WebAssembly: starts with 7f 45 4c 46"));
        assert!(refused(b"\0as").contains("truncated"));
        assert!(refused(&wat("(module)")).contains("without WIT metadata"));
        assert!(refused(&wat("(module (import \"env\" \"foo\" (func)))")).contains("imports `env.foo`"));
        assert!(refused(&wat("(component)")).contains("does not export headworks:plugin/lifecycle"));
        let import = |name: &str| refused(&wat(&format!("(component (import \"{name}\" (instance)))")));
        assert!(
            import("wasi:cli/environment@0.2.0")
                .contains("wasi:cli/environment@0.2.0: WASI is not served yet")
        );
        assert!(import("headworks:plugin/state@1.0.0").contains("not served by this version"));
        assert!(import("headworks:plugin/log@2.0.0").contains("speaks version 1"));
        assert!(import("acme:x/y").contains("unknown"));
        let of = |module: &str, name: &str| {
            refused(&wat(&format!("(module (import \"{module}\" \"{name}\" (func)))")))
        };
        assert!(of("env", "abort").contains("AssemblyScript"));
        assert!(of("wasi_snapshot_preview1", "fd_write").contains("Go and TinyGo"));
        assert!(of("gojs", "runtime.wasmExit").contains("GOOS=js"));
    }

    #[test]
    fn names_are_bounded_and_printable() {
        let import = |name: &str| format!("(import \"{name}\" (func))");
        let module = |imports: &str| wat::parse_str(format!("(module {imports})")).unwrap();
        let reason = refused(&module(&import("\\1b[31m\" \"x")));
        assert!(!reason.contains('\u{1b}') && reason.contains("[31m"), "{reason}");
        let many: String =
            (0..3_000).map(|n| format!("(import \"a:b/i{n}{}\" (instance))", "x".repeat(90))).collect();
        let many = wat::parse_str(format!("(component {many})")).unwrap();
        assert_eq!(Report::of(&many).0.kind, Err(LoadError::Names));
    }

    #[test]
    fn batch_and_message_together_are_refused_not_guessed() {
        let export = |names: &[&str]| {
            kind(&names.iter().map(|name| format!("{PACKAGE}{name}@1.4.0")).collect::<Vec<_>>())
        };
        assert_eq!(export(&["lifecycle", "batch", "message"]), Err(LoadError::BothKinds));
        assert_eq!(export(&["lifecycle"]), Err(LoadError::NoKind));
        assert_eq!(export(&["lifecycle", "batch"]), Ok(Kind::Batch));
        assert_eq!(export(&["lifecycle", "access"]), Ok(Kind::Access));
        assert_eq!(export(&["lifecycle", "batch", "access"]), Err(LoadError::BothKinds));
        assert!(matches!(export(&["lifecycle", "batch", "migration"]), Err(LoadError::ExportLater(_))));
    }

    #[test]
    fn every_cut_of_a_good_file_is_refused_without_a_panic() {
        let good = guarded();
        for end in (0..good.len()).step_by(7) {
            assert!(Report::of(&good[..end]).0.kind.is_err(), "cut at {end}");
        }
        // And a file that is not a plugin of ours at all.
        let other = embed("(module (memory (export \"memory\") 1))", "base");
        assert!(Report::of(&other).0.kind.is_err());
    }
}
