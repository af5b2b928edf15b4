// Posts over one HTTP/2 connection, as many requests at a time as it is asked for.
// Arguments: the URL of the host, then for https the CA's file and perhaps a certificate and its key.
// Each line of standard input is a request, {"id", "path", "headers", "body"}; each line of standard output
// an answer, {"id", "status", "retryAfter", "body"}. It ends with its connection.
'use strict';
const fs = require('node:fs');
const http2 = require('node:http2');
const readline = require('node:readline');

const [url, ca, cert, key] = process.argv.slice(2);
const read = (file) => file && fs.readFileSync(file);
const session = http2.connect(url, { ca: read(ca), cert: read(cert), key: read(key) });
session.on('error', () => {});
session.on('close', () => process.exit(0));

readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const { id, path, headers, body } = JSON.parse(line);
  let request;
  try {
    request = session.request({ ':method': 'POST', ':path': path, ...headers });
  } catch {
    // The connection has ended.
    process.exit(0);
  }
  let [status, retryAfter, text] = [0, null, ''];
  request.setEncoding('utf8');
  request.on('response', (answer) => {
    status = answer[':status'];
    retryAfter = answer['retry-after'] ?? null;
  });
  request.on('data', (data) => { text += data; });
  request.on('error', () => {});
  // With status 0 where there was no answer.
  request.on('close', () => console.log(JSON.stringify({ id, status, retryAfter, body: text })));
  request.end(body);
});
process.stdin.on('end', () => session.close());
