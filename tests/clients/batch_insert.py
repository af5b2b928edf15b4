# The reference page's batch insertion (psycopg2 execute_values), timed: the
# rival of our PostgreSQL sink. Reads records as JSON lines from a file, prints
# the seconds that the inserts took.
import json, sys, time
import psycopg2  # psycopg2-binary==2.9.9
from psycopg2.extras import execute_values

url, table, path, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with open(path) as lines:
    records = [tuple(json.loads(line)) for line in lines]
conn = psycopg2.connect(url)


def insert_batch(records):
    sql = f"""INSERT INTO {table} (time, device_id, location, metric, value)
             VALUES %s ON CONFLICT DO NOTHING"""
    with conn.cursor() as cur:
        execute_values(cur, sql, records, page_size=1000)
    conn.commit()


begin = time.perf_counter()
for at in range(0, len(records), size):
    insert_batch(records[at:at + size])
print(time.perf_counter() - begin)
