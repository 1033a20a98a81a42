// One process of the nodemailer peer: its pooled transport and its own DKIM, fed as its manual tells bulk senders to
// ("idle" and isIdle), so that messages wait in the file and not in its memory.
//
//     node nodemailer_worker.cjs NODEMAILER CORPUS PORT KEYFILE DOMAIN SELECTOR FIRST STEP COUNT POOL
//
// Sends messages FIRST, FIRST+STEP, ... below COUNT as `raw`, with the envelope beside it. The key is given as a parsed
// KeyObject: as PEM text, which the manual shows, it would be parsed again for every message.
// "ready", "go", then one line of JSON {began, sent}; ends when its input does.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const readline = require("node:readline");

const [library, folder, port, keyFile, domainName, keySelector, ...numbers] = process.argv.slice(2);
const [first, step, count, pool] = numbers.map(Number);
const nodemailer = require(library);
const corpus = JSON.parse(fs.readFileSync(path.join(folder, "corpus.json"), "utf8"));
const data = fs.openSync(path.join(folder, "corpus.mail"), "r");

const transport = nodemailer.createTransport({
  pool: true,
  host: "127.0.0.1",
  port: Number(port),
  name: "peer.test",
  secure: false,
  ignoreTLS: true,
  maxConnections: pool,
  maxMessages: Infinity,
  disableFileAccess: true,
  disableUrlAccess: true,
  dkim: {
    domainName,
    keySelector,
    privateKey: crypto.createPrivateKey(fs.readFileSync(keyFile)),
    cacheDir: false,
  },
});

let next = first;
let sent = 0;
let began = 0;

function fail(error) {
  process.stderr.write(`nodemailer: ${error.message}\n`);
  process.exit(1);
}

function message(number) {
  const length = corpus.offsets[number + 1] - corpus.offsets[number];
  const raw = Buffer.allocUnsafe(length);
  fs.readSync(data, raw, 0, length, corpus.offsets[number]);
  return { envelope: { from: corpus.sender, to: [corpus.recipients[number]] }, raw };
}

const wanted = Math.max(0, Math.ceil((count - first) / step));

function feed() {
  while (transport.isIdle() && next < count) {
    transport.sendMail(message(next), (error) => {
      if (error) return fail(error);
      if (++sent === wanted) finish();
    });
    next += step;
  }
}

function finish() {
  process.stdout.write(JSON.stringify({ began, sent }) + "\n");
  transport.close();
}

const input = readline.createInterface({ input: process.stdin });
input.once("line", () => {
  began = Date.now() / 1000;
  if (wanted === 0) return finish();
  transport.on("idle", feed);
  feed();
});
input.on("close", () => process.exit(0));
process.stdout.write("ready\n");
