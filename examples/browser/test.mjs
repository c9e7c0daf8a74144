// Drives the page in headless Chromium.
//
// usage: node test.mjs SITE REFERENCE.json [--screenshot FILE.png] [--frames]
//
// --frames asks that 99 of 100 frames take less than 50 ms, too: for a machine that does nothing else.
// The ids that the page chooses are those of the reference. Everything else is read from what the page draws.

import assert from "node:assert/strict";
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { gzipSync } from "node:zlib";
import { launch, listen, serve } from "./chromium.mjs";

const { values, positionals } = parseArgs({
  options: { screenshot: { type: "string" }, frames: { type: "boolean" } },
  allowPositionals: true,
});
const [site, reference] = positionals;
// Tokens after each prompt: more than a page of the cache holds, with those of the prompt.
const WANTED = 13;
// Milliseconds that a frame may take while the page decodes, if frames are asked for.
const FRAME = 50;

const { cases } = JSON.parse(await readFile(reference, "utf8"));
// Those whose choices are clear.
const texts = ["The capital of France is", "Water boils at", "My favourite season is autumn because"];
const chosen = texts.map((text) => cases.find(({ prompt }) => prompt === text));
assert(chosen.every(Boolean), "the reference has the prompts");

const { server, address } = await serve(site);
const browser = await launch();
const context = await browser.newContext({ viewport: { width: 1000, height: 900 }, acceptDownloads: true });
const page = await context.newPage();
// What the page says to nobody: there must be nothing.
const said = [];
listen(page, said);

const began = Date.now();
const say = (text) => console.log(`${((Date.now() - began) / 1000).toFixed(0).padStart(4)} s  ${text}`);
const phase = (name, timeout) =>
  page.waitForFunction((name) => document.body.dataset.phase === name, name, { timeout, polling: 200 });

/** What the page shows of its sequences and its pool. */
const shown = () =>
  page.evaluate(() => ({
    message: document.querySelector("#message span").textContent,
    sequences: [...document.querySelectorAll("article")].map((card) => ({
      ...card.dataset,
      text: card.querySelector(".text").textContent,
      drawn: [...card.querySelectorAll(".page")].map(({ dataset }) => ({ ...dataset })),
    })),
    pool: [...document.querySelectorAll("#pool .page")].map(({ dataset }) => ({ ...dataset })),
    cache: { ...document.getElementById("figures").dataset },
  }));

/** Waits until `holds` is true of what is shown, and returns that. */
async function until(what, holds, seconds = 180) {
  const end = Date.now() + 1000 * seconds;
  for (;;) {
    const now = await shown();
    assert.equal(now.message, "", `while waiting for ${what}`);
    if (holds(now)) return now;
    assert(Date.now() < end, `${what}: not within ${seconds} s; shown is ${JSON.stringify(now)}`);
    await page.waitForTimeout(50);
  }
}

const ids = (sequence) => sequence.ids.split(" ").filter(Boolean).map(Number);
const click = (number, what) => page.click(`article[data-number="${number}"] [data-do=${what}]`);
const stays = ({ status }) => ["stopped", "ended", "full"].includes(status);

/** The drawing agrees with itself: each page is drawn with the sequences whose pages it is among. */
function checkDrawing({ sequences, pool, cache }) {
  const sharers = new Map();
  for (const { number, pages } of sequences) {
    for (const at of pages.split(" ").filter(Boolean)) sharers.set(at, [...(sharers.get(at) ?? []), number]);
  }
  for (const { page: at, sequences: numbers } of [...pool, ...sequences.flatMap(({ drawn }) => drawn)]) {
    assert.equal(numbers, (sharers.get(at) ?? []).join(" "), `the sequences of page ${at}`);
  }
  assert.equal(Number(cache.used), sharers.size, "pages in use");
  assert.equal(Number(cache.shared), [...sharers.values()].filter((all) => all.length > 1).length, "shared pages");
}

let failure;
try {
  const program = await readFile(join(site, "pkg/browser_bg.wasm"));
  const [plain, zipped] = [program.length, gzipSync(program).length].map((bytes) => (bytes / 1e6).toFixed(2));
  say(`the program has ${plain} MB, ${zipped} MB compressed`);

  // A browser without WebGPU, and one that has it and no adapter.
  for (const [script, words] of [
    ["delete Navigator.prototype.gpu", "has no WebGPU"],
    ["GPU.prototype.requestAdapter = async () => null", "gives this page no GPU"],
  ]) {
    const other = await context.newPage();
    await other.addInitScript(script);
    await other.goto(address);
    await other.waitForFunction(() => document.body.dataset.phase === "over", null, { timeout: 60_000 });
    const text = await other.textContent("#message span");
    assert(text.includes(words), text);
    await other.close();
  }
  say("no WebGPU and no adapter are explained");

  await page.goto(address);
  await phase("idle", 60_000);
  say((await page.textContent("#adapter")).trim());

  // Cancelled, and begun again.
  await page.selectOption("#longest", "256");
  await page.click("#load");
  await page.click("#cancel");
  await phase("idle", 60_000);
  assert.match(await page.textContent("#message span"), /Cancelled/);
  await page.click("#load");
  await phase("ready", 400_000);
  const stages = await page.evaluate(() => [...document.querySelectorAll("#progress li")].map((row) => row.textContent.replace(/\s+/g, " ").trim()));
  say(stages.join("; "));

  // Several prompts at once.
  await page.fill("#prompt", texts.join("\n"));
  await page.fill("#wanted", String(WANTED));
  await page.click("#prompts [type=submit]");
  let now = await until("the texts", ({ sequences }) => sequences.length === texts.length && sequences.every(stays));
  checkDrawing(now);
  chosen.forEach(({ prompt, prompt_ids, greedy }, at) => {
    assert.equal(now.sequences[at].promptIds, prompt_ids.join(" "), prompt);
    assert.deepEqual(ids(now.sequences[at]), greedy.slice(0, WANTED), prompt);
  });
  say(`the ids of ${texts.length} prompts are those of the reference; ${(await page.textContent("#rate")).trim()}`);

  // A fork shares its pages until it writes.
  await page.fill("#wanted", "3");
  await click(1, "fork");
  now = await until("forks", ({ sequences }) => sequences.length === texts.length + 2);
  checkDrawing(now);
  const family = now.sequences.filter(({ number }) => ["1", "4", "5"].includes(number));
  assert.equal(new Set(family.map(({ pages }) => pages)).size, 1, "all pages are shared before a write");
  assert(family[0].drawn.length > 1 && family[0].drawn.every(({ sequences }) => sequences === "1 4 5"));
  now = await until("the forks' texts", ({ sequences }) => sequences.every(stays));
  checkDrawing(now);
  const [own, ...forks] = now.sequences.filter(({ number }) => ["1", "4", "5"].includes(number));
  assert.equal(own.drawn[0].sequences, "1 4 5", "the first page is still shared");
  for (const { drawn } of [own, ...forks]) assert(!drawn.at(-1).sequences.includes(" "), "the last page is its own");
  assert.deepEqual(ids(own), chosen[0].greedy.slice(0, WANTED + 3), "the first way is the best");
  assert.equal(new Set([own, ...forks].map((it) => ids(it)[WANTED])).size, 3, "three ways");
  say("three ways share their pages until they write");
  if (values.screenshot) await page.screenshot({ path: values.screenshot, fullPage: true });

  // Saved, removed, loaded, and continued as if nothing had been.
  const [download] = await Promise.all([page.waitForEvent("download"), click(3, "save")]);
  const saved = await download.path();
  await click(3, "remove");
  now = await until("removal", ({ sequences }) => !sequences.some(({ number }) => number === "3"));
  checkDrawing(now);
  await page.setInputFiles("#saved", { name: "saved.safetensors", mimeType: "", buffer: await readFile(saved) });
  now = await until("the loaded sequence", ({ sequences }) => sequences.some(({ number }) => number === "6"));
  checkDrawing(now);
  await click(6, "resume");
  now = await until("its text", ({ sequences }) => ids(sequences.at(-1)).length === WANTED + 3);
  assert.deepEqual(ids(now.sequences.at(-1)), chosen[2].greedy.slice(0, WANTED + 3), "the loaded sequence goes on");
  say(`a saved sequence (${(await stat(saved)).size} bytes) goes on to the reference's ids`);

  // A file of something else is refused in words, and nothing changes.
  await page.setInputFiles("#saved", { name: "other.safetensors", mimeType: "", buffer: Buffer.from("not a cache") });
  await page.waitForFunction(() => document.querySelector("#message span").textContent !== "");
  assert.match(await page.textContent("#message span"), /not a file that the page has saved/);
  await page.evaluate(() => (document.querySelector("#message span").textContent = ""));

  // Stopped in the middle.
  await page.fill("#wanted", "200");
  await page.fill("#prompt", texts[1]);
  await page.click("#prompts [type=submit]");
  await until("a text", ({ sequences }) => ids(sequences.at(-1)).length >= 2);
  await click(7, "stop");
  now = await until("the stop", ({ sequences }) => sequences.at(-1).status === "stopped");
  const kept = ids(now.sequences.at(-1));
  assert(kept.length < 50);
  assert.deepEqual(kept, chosen[1].greedy.slice(0, kept.length));
  say(`stopped after ${kept.length} tokens`);

  const figures = JSON.parse(await page.getAttribute("#frames", "data-figures"));
  const times = Object.entries(figures).map(([name, time]) => `${name} ${Math.round(time)}`);
  say(`frames while it decodes, in ms: ${times.join(", ")}`);
  assert(!values.frames || figures.p99 < FRAME, `a frame takes ${figures.p99} ms; it should take less than ${FRAME}`);
  assert.deepEqual(said, [], "errors and warnings in the console");

  // The device goes away while the page decodes.
  await click(7, "resume");
  await until("more text", ({ sequences }) => ids(sequences.at(-1)).length > kept.length);
  await page.evaluate(() => closeGpu());
  await phase("over", 60_000);
  assert.match(await page.textContent("#message span"), /taken the GPU away/);
  assert(await page.isVisible("#again"));
  await page.click("#again");
  await phase("idle", 60_000);
  say("a lost device is explained, and the page starts again");
} catch (error) {
  failure = error;
  for (const line of said) console.log(`console: ${line}`);
}
await browser.close();
server.close();
if (failure) {
  console.error(failure);
  process.exit(1);
}
say("passed");
