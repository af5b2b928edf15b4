//! What wit-bindgen makes of `wit/plugin.wit`, world `batch-plugin`.

wit_bindgen::generate!({
    path: "../wit",
    world: "batch-plugin",
    pub_export_macro: true,
    export_macro_name: "export_batch_plugin",
    default_bindings_module: "headworks_guest::bindings",
});
