//! The plugin contract (`wit/plugin.wit`) as Rust types, generated.
//!
//! Parts, so that each exists once: `base` is what every plugin imports and
//! exports, `batch`, `message` and `access` are the kinds of plugin.

/// `lifecycle`, and the host's side of the imports.
#[allow(unused_variables)]
pub mod base {
    wasmtime::component::bindgen!({
        path: "../wit",
        world: "base",
        imports: { default: trappable },
    });
}

/// `batch.process`: the arena, borrowed on the way in.
#[allow(unused_variables)]
pub mod batch {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "package headworks:host; world only-batch { export headworks:plugin/batch@1.0.0; }",
        world: "headworks:host/only-batch",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// `message.process`: one message at a time.
#[allow(unused_variables)]
pub mod message {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "package headworks:host; world only-message { export headworks:plugin/message@1.0.0; }",
        world: "headworks:host/only-message",
    });
}

/// `access`: who may connect.
#[allow(unused_variables)]
pub mod access {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "package headworks:host; world only-access { export headworks:plugin/access@1.0.0; }",
        world: "headworks:host/only-access",
    });
}
