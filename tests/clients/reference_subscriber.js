// The reference page's Node.js client as written, but for host, port and
// certificates, a second line of output per subscription, and standard output
// in Kafka's place: one line per message, as its `send` would get it.
const mqtt = require("mqtt");
const fs = require("fs");

const [url, ca] = process.argv.slice(2);
const mqttClient = mqtt.connect(url, {
  ca: ca && fs.readFileSync(ca),
  protocolVersion: 5,
});
const producer = {
  connect: async () => {},
  send: async ({ topic, messages }) => console.log(topic, messages[0].key, messages[0].value),
};

async function start() {
  await producer.connect();
  mqttClient.subscribe("acme/+/+/+/reading", { qos: 1 }, (error, granted) => {
    console.log("subscribed", error ? error.message : granted[0].qos);
  });
  mqttClient.on("message", async (topic, message) => {
    const key = topic.split("/")[3]; // device_id
    await producer.send({
      topic: "iot-telemetry-raw",
      messages: [{ key, value: message.toString() }],
    });
  });
}
start().catch(console.error);
