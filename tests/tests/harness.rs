//! The harness itself, proved against servers that are not ours.

use headworks_tests::mosquitto::{self, Mosquitto};
use headworks_tests::postgres::{Database, Postgres};
use headworks_tests::process::run;
use headworks_tests::publisher::{Address, Plan, Publisher};
use headworks_tests::{postgres, python};

#[test]
fn a_publisher_gets_every_message_acknowledged_by_mosquitto() {
    let broker = Mosquitto::start();
    let publishers: Vec<_> = [(0, 1), (1, 1), (2, 2), (3, 2)]
        .map(|(number, qos)| Publisher::start(Plan::new(number, qos), Address::new(broker.addr)))
        .into();
    for publisher in &publishers {
        publisher.await_acked(1000);
    }
    for publisher in publishers {
        assert!(publisher.finish().count >= 1000);
    }
}

#[test]
fn a_killed_postgres_comes_back_with_its_rows() {
    let mut server = Postgres::start();
    let mut database = server.database();
    let url = database.url().to_owned();
    database.execute("CREATE TABLE t (n INT); INSERT INTO t SELECT generate_series(1, 1000)");
    server.kill();
    assert!(database.try_execute("SELECT 1").is_err());
    server.restart();
    assert_eq!(Database::connect(&url).unwrap().count("t"), 1000);
}

#[test]
fn databases_of_the_shared_server_are_apart() {
    let (mut a, mut b) = (postgres::shared().database(), postgres::shared().database());
    a.execute("CREATE TABLE t (n INT); INSERT INTO t VALUES (1)");
    b.execute("CREATE TABLE t (n INT)");
    assert_eq!((a.count("t"), b.count("t")), (1, 0));
}

#[test]
fn the_clients_are_there() {
    let broker = Mosquitto::start();
    run(mosquitto::publish(broker.addr).args(["-t", "test/hello", "-m", "ping", "-q", "1"]));
    run(python::command().args(["-c", "import paho.mqtt.client, psycopg2.extras"]));
}
