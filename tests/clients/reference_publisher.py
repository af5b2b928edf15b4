# The reference page's publisher as written, but for host, port, TLS, the
# sensor and an end: it sends a fixed number of readings without the pause.
# HOST PORT COUNT [tls CA [CERT KEY]] [websockets]
import paho.mqtt.client as mqtt  # paho-mqtt==1.6.1
import json, ssl, sys, time

BROKER = sys.argv[1]
PORT = int(sys.argv[2])
COUNT = int(sys.argv[3])
TOPIC = "acme/site-01/temperature/sensor-001/reading"


def read_sensor(n):
    return 20.0 + n


TRANSPORT = "websockets" if "websockets" in sys.argv else "tcp"
CERTS = [arg for arg in sys.argv[5:] if arg != "websockets"]

client = mqtt.Client(protocol=mqtt.MQTTv5, transport=TRANSPORT)
if "tls" in sys.argv:
    client.tls_set(
        ca_certs=CERTS[0],
        certfile=CERTS[1] if len(CERTS) > 1 else None,
        keyfile=CERTS[2] if len(CERTS) > 1 else None,
        tls_version=ssl.PROTOCOL_TLS_CLIENT
    )
client.connect(BROKER, PORT)
client.loop_start()

for n in range(COUNT):
    payload = {
        "device_id": "sensor-001",
        "metric": "temperature_c",
        "value": read_sensor(n),
        "ts": int(time.time() * 1000)
    }
    sent = client.publish(TOPIC, json.dumps(payload), qos=1)
    sent.wait_for_publish(30)
    if not sent.is_published():
        sys.exit("no PUBACK within 30 s")

client.loop_stop()
client.disconnect()
print("acknowledged", COUNT)
