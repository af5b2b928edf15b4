// Logs in with mqtt.js by SCRAM-SHA-256 (MQTT 5's enhanced authentication),
// and publishes: what a user of that library writes.
const crypto = require("crypto");
const mqtt = require("mqtt");

const [url, user, password] = process.argv.slice(2);
const authenticationMethod = "SCRAM-SHA-256";
const hmac = (key, text) => crypto.createHmac("sha256", key).update(text).digest();
const first = `n=${user},r=${crypto.randomBytes(18).toString("base64")}`;
let serverFinal;

const client = mqtt.connect(url, {
  protocolVersion: 5,
  reconnectPeriod: 0,
  properties: { authenticationMethod, authenticationData: Buffer.from("n,," + first) },
});
client.handleAuth = (packet, answer) => {
  const serverFirst = packet.properties.authenticationData.toString();
  const field = Object.fromEntries(serverFirst.split(",").map((part) => [part[0], part.slice(2)]));
  const salt = Buffer.from(field.s, "base64");
  const salted = crypto.pbkdf2Sync(password, salt, Number(field.i), 32, "sha256");
  const unproven = `c=biws,r=${field.r}`;
  const said = [first, serverFirst, unproven].join(",");
  const clientKey = hmac(salted, "Client Key");
  const signature = hmac(crypto.createHash("sha256").update(clientKey).digest(), said);
  const proof = clientKey.map((byte, i) => byte ^ signature[i]);
  serverFinal = "v=" + hmac(hmac(salted, "Server Key"), said).toString("base64");
  const authenticationData = Buffer.from(`${unproven},p=${Buffer.from(proof).toString("base64")}`);
  answer(null, { cmd: "auth", reasonCode: 0x18, properties: { authenticationMethod, authenticationData } });
};
client.on("connect", async (connack) => {
  if (connack.properties.authenticationData.toString() !== serverFinal) throw new Error("not the server");
  await client.publishAsync(`${user}/x`, "x", { qos: 1 });
  console.log("the server proved itself; published");
  client.end();
});
client.on("error", (error) => {
  console.log("refused", error.code);
  client.end();
});
