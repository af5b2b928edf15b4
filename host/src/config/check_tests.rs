use std::collections::BTreeMap;

use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::*;

#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[allow(dead_code)]
struct House {
    rooms_max: u16,
    heat: Option<Period>,
    size: Option<ByteSize>,
    doors: BTreeMap<String, Door>,
    colour: Option<Colour>,
    name: Option<Name>,
    floors: Vec<Floor>,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Door {
    Wood(Wood),
    Glass(Glass),
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Wood {
    tree: String,
    #[serde(default)]
    locks: u32,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
struct Glass {
    panes: u8,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Colour {
    /// Like the sky.
    Blue,
    /// Like grass.
    Green,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
enum Name {
    Short(String),
    Long { first: String, last: String },
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Floor {
    number: i32,
}

fn house(value: Value) -> Vec<String> {
    let schema = crate::config::schema_of(schema_for!(House));
    let checked = check(&schema, &value);
    serde_json::from_value::<House>(checked.value.clone())
        .unwrap_or_else(|error| panic!("repaired, yet {error}: {}", checked.value));
    checked.problems.iter().map(|p| format!("{}: {}", p.path.as_str(), p.message)).collect()
}

#[test]
fn what_fits_has_no_problem() {
    let fits = json!({
        "rooms_max": 3, "heat": "5s", "size": 10, "colour": "blue", "name": { "first": "a", "last": "b" },
        "doors": { "front": { "type": "wood", "tree": "oak" }, "back": { "type": "glass" } },
        "floors": [{ "number": 1 }],
    });
    assert_eq!(house(fits), [""; 0]);
    assert_eq!(house(json!({ "heat": null, "floors": null, "name": "x" })), [""; 0]);
}

#[test]
fn every_problem_is_found_at_once_and_the_rest_still_deserializes() {
    let problems = house(json!({
        "room_max": "three", "heat": "5 parsecs", "size": -1, "colour": "gren", "name": 7, "windows": 1,
        "doors": {
            "a": { "type": "wood", "locks": 1.5 },
            "b": { "type": "glas" },
            "c": { "tree": "oak" },
            "d": { "type": "glass", "panes": 300, "tree": "oak" },
            "e": 4,
        },
        "floors": [{ "number": 1 }, { "nubmer": 2 }, 3],
    }));
    assert_eq!(
        problems,
        [
            "colour: must be one of blue, green, is \"gren\" (did you mean `green`?)",
            "doors.a.locks: must be a whole number, is 1.5",
            "doors.a.tree: is missing",
            "doors.b.type: must be one of wood, glass, is \"glas\" (did you mean `glass`?)",
            "doors.c.type: is missing, must be one of wood, glass",
            "doors.d.panes: must be at most 255, is 300",
            "doors.d.tree: unknown key",
            "doors.e: must be a mapping (`key: value`), is 4",
            "floors[1].nubmer: unknown key, did you mean `number`?",
            "floors[2]: must be a mapping (`key: value`), is 3",
            "heat: must be a time such as 300ms, 5s or 7d, is \"5 parsecs\"",
            "name: must be text or a mapping (`key: value`), is 7: put it in quotes",
            "room_max: unknown key, did you mean `rooms_max`?",
            "room_max: must be a whole number, is \"three\"",
            "size: must be a size such as 64KiB or 20GiB, is -1",
            "windows: unknown key, known are rooms_max",
        ]
    );
}
