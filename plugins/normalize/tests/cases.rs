//! The case files, run natively.

#[test]
fn every_case_becomes_what_it_says() {
    headworks_guest::cases::check_folder::<normalize::Normalize>(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/cases"
    ));
}
