//! What wit-bindgen makes of `wit/plugin.wit`: what every plugin has, and each
//! kind of plugin by itself. A component has the metadata of all that it exports.

wit_bindgen::generate!({
    path: "../wit",
    world: "base",
    pub_export_macro: true,
    export_macro_name: "export_base",
    default_bindings_module: "headworks_guest::bindings",
});

/// `batch`; its one function is `plugin::entry`'s.
pub mod only_batch {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "package headworks:guest; world only-batch { export headworks:plugin/batch@1.0.0; }",
        world: "headworks:guest/only-batch",
        generate_all,
        skip: ["process"],
        pub_export_macro: true,
        export_macro_name: "export_only_batch",
        default_bindings_module: "headworks_guest::bindings::only_batch",
    });
}

/// `access`.
pub mod only_access {
    wit_bindgen::generate!({
        path: "../wit",
        inline: "package headworks:guest; world only-access { export headworks:plugin/access@1.0.0; }",
        world: "headworks:guest/only-access",
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_only_access",
        default_bindings_module: "headworks_guest::bindings::only_access",
    });
}
