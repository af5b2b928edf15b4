#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headworks::fuzzing::run("http_batch", data));
