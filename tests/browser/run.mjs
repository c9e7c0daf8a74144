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

const { server, address } = await serve(folder);
const browser = await launch();
const said = [];
async function open() {
  const page = await browser.newPage();
  listen(page, said);
  await page.goto(histories ? `${address}?histories=${histories}` : address);
  await page.waitForFunction(() => globalThis.run !== undefined, undefined, { timeout: 60_000 });
  return page;
}

let page = await open();
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
  const message = await page.evaluate((number) => globalThis.run(number), number);
  const seconds = ((Date.now() - start) / 1000).toFixed(1);
  console.log(`test ${names[number]} ... ${message === undefined ? "ok" : "FAILED"} (${seconds} s)`);
  if (message !== undefined) {
    failures.push(names[number]);
    console.log(message);
    for (const line of said.slice(0, 5)) console.log(`console: ${line}`);
    // The module has trapped, and its state with it.
    await page.close();
    page = await open();
  }
}
for (const name of failures) console.log(`failed: ${name}`);
const passed = numbers.length - failures.length;
console.log(`\ntest result: ${passed} passed; ${failures.length} failed; finished in ${((Date.now() - begin) / 1000).toFixed(0)} s`);
await browser.close();
server.close();
process.exit(failures.length === 0 && passed > 0 ? 0 : 1);
