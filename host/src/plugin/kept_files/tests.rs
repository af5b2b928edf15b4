use super::*;

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn a_file_stays_while_a_record_names_it_or_the_process_uses_it() {
    let dir = tempfile::tempdir().unwrap();
    let named: Arc<Mutex<Option<BTreeSet<String>>>> = Arc::new(Mutex::new(Some(BTreeSet::new())));
    let of_records = Arc::clone(&named);
    let mut files = KeptFiles::new(
        &dir.path().join("files"),
        Box::new(move || lock(&of_records).clone()),
        Failures::default(),
    );
    let name = |sha256: &str| *lock(&named) = Some([sha256.to_owned()].into());
    let first = files.keep("a", b"first".to_vec());
    assert!(first.is_stored());
    name("a");
    drop(first);
    drop(files.keep("b", b"second".to_vec()));
    let third = files.keep("c", b"third".to_vec());
    assert_eq!(names(&files.folder.0), ["a.wasm", "c.wasm"], "nothing needs the second one");
    assert_eq!(files.folder().read("a").unwrap().as_deref(), Some(&b"first"[..]));
    assert!(files.folder().read("b").unwrap().is_none());
    *lock(&named) = None;
    drop(third);
    drop(files.keep("d", b"fourth".to_vec()));
    assert_eq!(names(&files.folder.0), ["a.wasm", "c.wasm", "d.wasm"], "a record could not be read");
    name("d");
    drop(files.keep("a", b"first".to_vec()));
    assert_eq!(names(&files.folder.0), ["a.wasm", "d.wasm"]);
}

#[test]
fn a_file_that_could_not_be_stored_is_stored_once_it_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("files");
    fs::write(&folder, b"in its place").unwrap();
    let mut files = KeptFiles::new(&folder, Box::new(|| Some(BTreeSet::new())), Failures::default());
    let file = files.keep("a", b"first".to_vec());
    files.retry();
    assert!(!file.is_stored() && !files.keep("a", b"first".to_vec()).is_stored());
    fs::remove_file(&folder).unwrap();
    files.retry();
    assert!(file.is_stored());
    assert_eq!(names(&folder), ["a.wasm"]);
}

#[test]
fn a_file_stays_whose_version_is_recorded_and_leaves_the_process_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let (recorded, version) = (Arc::new(Mutex::new(BTreeSet::new())), Arc::new(Mutex::new(None)));
    let (records, leaves) = (Arc::clone(&recorded), Arc::clone(&version));
    let named = move || {
        let before = lock(&records).clone();
        if lock(&leaves).take().is_some() {
            lock(&records).insert("a".to_owned());
        }
        Some(before)
    };
    let mut files = KeptFiles::new(dir.path(), Box::new(named), Failures::default());
    let file = files.keep("a", b"first".to_vec());
    *lock(&version) = Some(file);
    drop(files.keep("b", b"second".to_vec()));
    assert_eq!(names(dir.path()), ["a.wasm", "b.wasm"]);
    drop(files.keep("c", b"third".to_vec()));
    assert_eq!(names(dir.path()), ["a.wasm", "c.wasm"], "a record names it");
}

#[test]
fn a_file_that_is_damaged_is_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.wasm"), b"torn!").unwrap();
    let mut files = KeptFiles::new(dir.path(), Box::new(|| Some(BTreeSet::new())), Failures::default());
    assert!(files.keep("a", b"first".to_vec()).is_stored());
    assert_eq!(files.folder().read("a").unwrap().as_deref(), Some(&b"first"[..]));
}
