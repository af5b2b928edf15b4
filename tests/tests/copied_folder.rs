//! Copies of a data folder, as backups and clones of machines make them: whatever another copy
//! delivered meanwhile, each message that this one acknowledged is a row, once, dead letters among
//! them. And a copy of the database.

use std::process::Command;

use headworks_tests::host::Host;
use headworks_tests::postgres::{Database, Postgres};
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats};

#[test]
fn a_restored_folder_skips_and_doubles_nothing_though_the_database_is_away_at_its_start() {
    let mut server = Postgres::start();
    let mut database = server.database();
    let url = database.url().to_owned();
    let mut host = Host::start("restored", &telemetry::config(&telemetry::postgres_sink(&url)));
    let mut sent = publish(&host, 0, 100);
    telemetry::written_to_postgres(&host, &mut database);
    assert!(host.stop().success());
    copy(&host, "data", &host, "backup");
    host.run();
    sent.extend(publish(&host, 1, 300));
    telemetry::written_to_postgres(&host, &mut database);
    let lost_end = host.end();
    assert!(host.stop().success());

    drop(database);
    server.stop();
    std::fs::remove_dir_all(host.folder.join("data")).expect("our folder");
    copy(&host, "backup", &host, "data");
    // Twice, and past the position that the lost folder left.
    for device in [2, 3] {
        host.launch();
        host.wait_serving();
        sent.extend(publish(&host, device, 300));
        if device == 2 {
            host.kill();
        }
    }
    assert!(host.end() > lost_end);
    let said = host.log().len();
    server.restart();
    let mut database = Database::connect(&url).expect("the server runs");
    telemetry::written_to_postgres(&host, &mut database);
    host.says_past(said, "so that no message of this folder is skipped");
    assert!(host.stop().success());
    telemetry::assert_rows(&telemetry::postgres_rows(&mut database, "telemetry"), &sent, Repeats::None);
}

#[test]
fn of_two_hosts_on_copies_of_a_folder_one_writes_the_other_stops_and_nothing_is_skipped() {
    let server = Postgres::start();
    let mut database = server.database();
    let config = telemetry::config(&telemetry::postgres_sink(database.url()));
    let mut older = Host::start("copied-older", &config);
    let mut sent = publish(&older, 0, 100);
    telemetry::written_to_postgres(&older, &mut database);
    assert!(older.stop().success());
    let mut newer = Host::prepare("copied-newer", &config);
    copy(&older, "data", &newer, "data");
    older.run();
    newer.run();
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'headworks%'",
    );
    let of_older = publish(&older, 1, 300);
    older.says("two hosts must not write as the same pipeline");
    sent.extend(publish(&newer, 2, 200));
    has_rows(&mut database, &sent);
    assert!(newer.stop().success());
    assert!(older.stop().success());

    // Somebody decides for the older one, then for the newer one again.
    older.run();
    sent.extend(of_older);
    sent.extend(publish(&older, 3, 50));
    has_rows(&mut database, &sent);
    assert!(older.stop().success());
    newer.run();
    sent.extend(publish(&newer, 4, 50));
    has_rows(&mut database, &sent);
    assert!(newer.stop().success());
    telemetry::assert_rows(&telemetry::postgres_rows(&mut database, "telemetry"), &sent, Repeats::None);
}

#[test]
fn a_folder_restored_from_before_a_redrive_sends_no_dead_letter_a_second_time() {
    let server = Postgres::start();
    let mut database = server.database();
    let mut host =
        Host::start("restored-letters", &telemetry::config(&telemetry::postgres_sink(database.url())));
    let mut sent = publish(&host, 0, 50);
    telemetry::written_to_postgres(&host, &mut database);
    reject_odd_values(&mut database);
    sent.extend(publish(&host, 1, 100));
    telemetry::written_to_postgres(&host, &mut database);
    assert!(host.stop().success());
    copy(&host, "data", &host, "backup");
    database.execute("ALTER TABLE telemetry DROP CONSTRAINT even");
    host.run();
    let letters = open_letters(&host);
    assert!(letters >= 50, "{letters}");
    host.cli(&REDRIVE);
    assert_eq!(open_letters(&host), 0);
    assert!(host.stop().success());

    std::fs::remove_dir_all(host.folder.join("data")).expect("our folder");
    copy(&host, "backup", &host, "data");
    host.run();
    assert_eq!(open_letters(&host), letters);
    let said = host.cli(&REDRIVE);
    let before =
        format!("; {letters} dead letters sent before by another copy of this data folder, and closed");
    assert!(said.contains(", 0 rows written;") && said.contains(&before), "{said}");
    assert_eq!(open_letters(&host), 0);
    assert!(host.stop().success());
    is_each_a_row_once(&mut database, &sent);
}

/// The table and its positions are put back as they were, which is what a backup of the database has.
#[test]
fn a_database_restored_from_before_a_redrive_gets_the_rows_of_its_dead_letters_again_once() {
    let server = Postgres::start();
    let mut database = server.database();
    let config = telemetry::config(&telemetry::postgres_sink(database.url()));
    let mut host = Host::start("restored-database", &config);
    let mut sent = publish(&host, 0, 50);
    telemetry::written_to_postgres(&host, &mut database);
    reject_odd_values(&mut database);
    sent.extend(publish(&host, 1, 100));
    telemetry::written_to_postgres(&host, &mut database);
    let letters = open_letters(&host);
    assert!(letters >= 50, "{letters}");

    database.execute(
        "CREATE TABLE saved_rows AS TABLE telemetry; CREATE TABLE saved_positions AS TABLE headworks_positions; \
         ALTER TABLE telemetry DROP CONSTRAINT even",
    );
    host.cli(&REDRIVE);
    assert_eq!(open_letters(&host), 0);
    assert!(host.stop().success());
    database.execute(
        "TRUNCATE telemetry, headworks_positions; INSERT INTO telemetry SELECT * FROM saved_rows; \
         INSERT INTO headworks_positions SELECT * FROM saved_positions",
    );
    let said = host.log().len();
    host.run();
    host.says_past(said, "does not have dead letters that were sent to it");
    assert_eq!(open_letters(&host), letters);
    host.cli(&REDRIVE);
    assert!(host.stop().success());
    is_each_a_row_once(&mut database, &sent);
}

const REDRIVE: [&str; 3] = ["dead-letters", "redrive", "--all"];

fn reject_odd_values(database: &mut Database) {
    database.execute("ALTER TABLE telemetry ADD CONSTRAINT even CHECK (value::bigint % 2 = 0) NOT VALID");
}

fn open_letters(host: &Host) -> usize {
    host.cli_json(&["dead-letters", "list"]).len()
}

fn is_each_a_row_once(database: &mut Database, sent: &[Sent]) {
    let rows = &database.query("SELECT count(*), count(DISTINCT (device_id, value)) FROM telemetry")[0];
    let count = sent.iter().map(|device| device.count).sum::<u64>().cast_signed();
    assert_eq!((rows.get::<_, i64>(0), rows.get::<_, i64>(1)), (count, count));
}

/// At least so many messages of one device.
fn publish(host: &Host, device: usize, count: u64) -> Vec<Sent> {
    let publisher = Publisher::start(Plan::new(device, 1), Address::new(host.mqtt()));
    publisher.await_acked(count);
    vec![publisher.finish()]
}

fn has_rows(database: &mut Database, sent: &[Sent]) {
    let count = sent.iter().map(|device| device.count).sum::<u64>().cast_signed();
    database.changes("telemetry", "all is written", |database| {
        (database.count("telemetry") >= count).then_some(())
    });
}

fn copy(of: &Host, from: &str, to: &Host, name: &str) {
    let copied = Command::new("cp").arg("-a").arg(of.folder.join(from)).arg(to.folder.join(name)).status();
    assert!(copied.expect("cp runs").success());
}
