#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headworks::fuzzing::run("mqtt_session", data));
