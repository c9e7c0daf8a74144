// Runs the conformance tests in headless Chromium.
//
// usage: node run.mjs FOLDER [--histories N] [FILTER ...]
//
// FOLDER holds the page, the module and the traces. A test runs if its name contains one of the filters.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { join, normalize } from "node:path";
import { chromium } from "playwright-core";

const [folder, ...rest] = process.argv.slice(2);
let histories;
const filters = [];
while (rest.length > 0) {
  const word = rest.shift();
  if (word === "--histories") histories = rest.shift();
  else filters.push(word);
}

const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };
const server = createServer(async (request, response) => {
  const path = normalize(new URL(request.url, "http://localhost").pathname);
  try {
    const bytes = await readFile(join(folder, path === "/" ? "index.html" : path));
    const type = types[path.slice(path.lastIndexOf("."))] ?? "text/html";
    response.writeHead(200, { "Content-Type": type }).end(bytes);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const address = `http://127.0.0.1:${server.address().port}/${histories ? `?histories=${histories}` : ""}`;

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--disable-gpu-sandbox",
  ],
});
const said = [];
async function open() {
  const page = await browser.newPage();
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) said.push(message.text());
  });
  page.on("pageerror", (error) => said.push(String(error)));
  await page.goto(address);
  await page.waitForFunction(() => globalThis.run !== undefined, undefined, { timeout: 60_000 });
  return page;
}

let page = await open();
const names = await page.evaluate(() => globalThis.names);
const numbers = names.map((_, number) => number).filter(
  (number) => filters.length === 0 || filters.some((filter) => names[number].includes(filter)),
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
