//! Copies of a data folder, as backups and clones of machines make them: whatever another copy
//! delivered meanwhile, each message that this one acknowledged is a row, once.

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
