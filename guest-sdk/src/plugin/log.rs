//! The host's log. Natively: standard error.

/// What a person wants while looking for a fault of the plugin.
pub fn debug(text: impl AsRef<str>) {
    write(2, text.as_ref());
}

pub fn info(text: impl AsRef<str>) {
    write(3, text.as_ref());
}

pub fn warn(text: impl AsRef<str>) {
    write(4, text.as_ref());
}

/// Something that a person must look at.
pub fn error(text: impl AsRef<str>) {
    write(5, text.as_ref());
}

#[cfg(target_family = "wasm")]
fn write(level: u8, text: &str) {
    crate::bindings::headworks::plugin::log::write(level, text);
}

#[cfg(not(target_family = "wasm"))]
fn write(level: u8, text: &str) {
    eprintln!("plugin: level {level}: {text}");
}

/// A panic's text, file and line become the reason of the dead letter, which
/// wasm32-unknown-unknown would lose.
pub(crate) fn install_panic_hook() {
    #[cfg(target_family = "wasm")]
    std::panic::set_hook(Box::new(|panic| {
        let (file, line) = panic.location().map_or(("", 0), |at| (at.file(), at.line()));
        let text = panic.payload_as_str().unwrap_or("panic without a text");
        crate::bindings::headworks::plugin::log::abort(text, file, line);
    }));
}
