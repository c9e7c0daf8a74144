// Runs the conformance tests in headless Chromium.
//
// usage: node run.mjs FOLDER [--histories N] [--skip TEXT] [FILTER ...]
//
// FOLDER holds the page, the module and the traces. A test runs if its name contains one of the filters, and none of
// the texts to skip.

import { launch, listen, serve } from "./chromium.mjs";

const [folder, ...rest] = process.argv.slice(2);
let histories;
const filters = [];
const skipped = [];
while (rest.length > 0) {
  const word = rest.shift();
  if (word === "--histories") histories = rest.shift();
  else if (word === "--skip") skipped.push(rest.shift());
  else filters.push(word);
}

// The browser knows the size of a page's JavaScript, and not that of the GPU objects which wait with it to be collected:
// left to itself, it lets the page of these tests grow to 12 GB.
const MOST_GARBAGE = 64 << 20;

const { server, address } = await serve(folder);
const browser = await launch();
const said = [];
let page;
let inspector;
async function open() {
  await page?.close();
  page = await browser.newPage();
  inspector = await page.context().newCDPSession(page);
  listen(page, said);
  await page.goto(histories ? `${address}?histories=${histories}` : address);
  await page.waitForFunction(() => globalThis.run !== undefined, undefined, { timeout: 60_000 });
}

/** Runs a test. Returns the message of one that failed, or nothing. */
async function run(number) {
  const message = await page.evaluate((number) => globalThis.run(number), number);
  const { usedSize, embedderHeapUsedSize } = await inspector.send("Runtime.getHeapUsage");
  if (usedSize + embedderHeapUsedSize > MOST_GARBAGE) await inspector.send("HeapProfiler.collectGarbage");
  return message;
}

await open();
const names = await page.evaluate(() => globalThis.names);
const numbers = names.map((_, number) => number).filter(
  (number) => (filters.length === 0 || filters.some((filter) => names[number].includes(filter)))
    && !skipped.some((text) => names[number].includes(text)),
);
console.log(`running ${numbers.length} of ${names.length} tests in Chromium ${browser.version()}`);
const failures = [];
const begin = Date.now();
for (const number of numbers) {
  const start = Date.now();
  said.length = 0;
  // A page that crashes takes its test with it, and none of the others. The test has a second page to itself.
  const message = await run(number).catch(async (crash) => {
    console.log(`test ${names[number]} ... the page is gone, once more in a new one: ${crash}`);
    await open();
    return run(number).catch(String);
  });
  const seconds = ((Date.now() - start) / 1000).toFixed(1);
  console.log(`test ${names[number]} ... ${message === undefined ? "ok" : "FAILED"} (${seconds} s)`);
  if (message !== undefined) {
    failures.push(names[number]);
    console.log(message);
    for (const line of said.slice(0, 5)) console.log(`console: ${line}`);
    // The module has trapped, and its state with it.
    await open();
  }
}
for (const name of failures) console.log(`failed: ${name}`);
const passed = numbers.length - failures.length;
console.log(`\ntest result: ${passed} passed; ${failures.length} failed; finished in ${((Date.now() - begin) / 1000).toFixed(0)} s`);
await browser.close();
server.close();
process.exit(failures.length === 0 && passed > 0 ? 0 : 1);
