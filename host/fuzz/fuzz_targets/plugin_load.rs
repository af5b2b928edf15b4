#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headworks::fuzzing::run("plugin_load", data));
