// The page: its state, and what happens when.

import { dropped, inspect, isPhoto, Queue } from "./inspect.js";
import { regions, Stage } from "./stage.js";
import { csv, Table } from "./table.js";
import { number, percent, promisedRate, Strip } from "./threshold.js";

const SIGNS = { good: "M9 25l10 11L40 12", bad: "M12 12l24 24M36 12L12 36", setup: "M24 5l21 37H3zM24 20v7M24 34v.5", failed: "M24 8v20M24 38v1", waiting: "" };
const BIG = { good: "GOOD", bad: "DEFECT", setup: "SETUP", failed: "NOT READ", waiting: "inspecting …" };
const MOST_LISTED = 50; // defects of one photo
const $ = (id) => document.getElementById(id);

const stage = new Stage({ stage: $("stage"), frame: $("frame"), photo: $("photo"), repaired: $("repaired"), heat: $("heat"), outlines: $("outlines") });
const table = new Table($("rows"), [...document.querySelectorAll("th")], (item) => {
  choose(item);
  $("view").scrollIntoView({ block: "start" }); // the table may be far below the verdict
});
const queue = new Queue(work);
let model, strip, threshold;
let items = [], chosen = null, heats = null, photoUrl = null, numAdded = 0;

start();

async function start() {
  try {
    const answer = await fetch("/model");
    if (!answer.ok) throw new Error();
    model = await answer.json();
  } catch {
    return say("The server does not answer. Load this page again when it runs.");
  }
  threshold = model.threshold.value;
  strip = new Strip($("strip"), $("threshold"), model.held_out_scores, threshold);
  $("model").textContent = model.name;
  $("promise-start").textContent = `The model’s threshold comes ${model.threshold.promise}.`;
  stage.setOpacity(0.6);
  listen();
  document.body.classList.add("ready");
}

/** Adds files, each as {file, name}, and looks at the first of them. */
function add(files) {
  const photos = files.length === 1 ? files : files.filter(isPhoto); // a single file was meant
  const passed = files.length - photos.length;
  say(passed ? `${passed} of ${files.length} files are no photos and were passed over.` : "");
  if (!photos.length) return;
  photos.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  const added = photos.map(({ file, name }) => ({ file, name, order: ++numAdded, verdict: "waiting", defects: [] }));
  items.push(...added);
  document.body.classList.remove("empty");
  choose(added[0]);
  queue.add(added);
}

async function work(item) {
  if (!items.includes(item)) return; // cleared
  try {
    Object.assign(item, await inspected(item));
    delete item.error;
  } catch (error) {
    if (item.score === undefined) { // else it has its verdict; only its pictures could not be had again
      item.verdict = "failed";
      item.error = error.message.replace(/^cannot inspect .*?: /, "");
    }
    if (error.isServer) say("The server does not answer. Photos that were not read can be added again.");
  }
  judge(item);
  strip.setRange(scored().map((each) => each.score));
  if (item === chosen) choose(item);
  else draw();
}

async function inspected(item, pictures) {
  const { name, ...found } = await inspect(item.file, item.name, model.limits, pictures); // the name here has its folder
  return found;
}

/** The verdict at the present threshold: no inspection is needed for it. */
function judge(item) {
  if (item.score === undefined) return;
  item.verdict = item.setup_alarm ? "setup" : item.score > threshold ? "bad" : "good";
  item.marked = item.score > threshold && threshold === item.threshold ? item.defects.length : null; // else: when looked at
}

function scored() {
  return items.filter((item) => item.score !== undefined);
}

/** Looks at a photo; asks for its pictures again if the server has forgotten them. */
async function choose(item) {
  if (chosen !== item || !photoUrl) {
    if (photoUrl) URL.revokeObjectURL(photoUrl);
    photoUrl = URL.createObjectURL(item.file);
  }
  chosen = item;
  heats = null;
  stage.setShown(item.verdict !== "failed");
  draw();
  const pictures = item.pictures ?? {};
  try {
    const values = await stage.show(pictures.photo ?? photoUrl, item, pictures.repaired, pictures.heat);
    if (chosen === item) heats = values;
  } catch {
    if (item.retried || chosen !== item) return;
    item.retried = true; // the links are forgotten
    await work(item);
    item.retried = false;
    return;
  }
  drawMarks();
}

/** A browser knows fewer formats than the server: then the server makes the picture. */
$("photo").addEventListener("error", async () => {
  const item = chosen;
  if (!item) return;
  stage.setShown(false); // no picture rather than a broken one
  if (item.score === undefined || item.pictures?.photo) return;
  try {
    Object.assign(item, await inspected(item, "repaired,heat,photo"));
    judge(item);
    if (item === chosen) choose(item);
  } catch {
    say("The server does not answer.");
  }
});

function draw() {
  const done = items.filter((item) => item.verdict !== "waiting");
  const [bad, good, setup, failed] = ["bad", "good", "setup", "failed"].map((verdict) => items.filter((item) => item.verdict === verdict).length);
  $("view").hidden = $("batch").hidden = !items.length;
  document.body.classList.toggle("empty", !items.length);
  $("progress").hidden = done.length === items.length;
  $("progress").value = items.length ? done.length / items.length : 0;
  const counts = [[bad, "defect"], [good, "good"], [setup, "setup"], [failed, "not read"], [items.length - done.length, "to come"]];
  $("counts").replaceChildren(...counts.filter(([count]) => count).flatMap(([count, word], i) => [
    i ? " · " : "", Object.assign(document.createElement("b"), { textContent: count }), ` ${word}`]));
  if (!items.length) return;
  drawVerdict();
  drawThreshold();
  drawMarks();
  table.draw(items, chosen); // after the marks, which are counted there
  const order = table.sorted(items);
  $("place").textContent = `${order.indexOf(chosen) + 1} of ${order.length}`;
}

function drawVerdict() {
  const { verdict, name, score, error, setup_reason } = chosen;
  if ($("verdict").className !== verdict) $("verdict").className = verdict;
  $("sign").setAttribute("d", SIGNS[verdict]);
  if ($("word").textContent !== BIG[verdict]) $("word").textContent = BIG[verdict];
  $("name").textContent = name;
  $("why").textContent = verdict === "failed" ? error : score === undefined ? "" : `score ${number(score)}, threshold ${number(threshold)}`;
  $("setup").textContent = verdict === "setup" ? `${setup_reason} – see to light, focus and pose; the score says little of the part` : "";
  $("setup").hidden = verdict !== "setup";
  document.title = `${BIG[verdict]} – ${name}`;
}

function drawThreshold() {
  const all = scored(), judged = all.filter((item) => item.verdict !== "setup"), bad = judged.filter((item) => item.verdict === "bad").length;
  const trained = model.threshold.value, rate = threshold === trained ? model.threshold.false_reject_rate : promisedRate(model.held_out_scores, threshold);
  strip.draw(all, threshold, chosen);
  $("threshold-value").textContent = number(threshold);
  $("rejected").textContent = judged.length ? `rejects ${bad} of ${judged.length}` : "";
  $("promise").textContent = `Promise: at most ${percent(rate)} of good parts are rejected on average, from ${model.held_out_scores.length} good photos.`;
  $("reset").hidden = threshold === trained;
}

/** Outlines and the list of defects, at the present threshold. */
function drawMarks() {
  const isBad = chosen.score > threshold;
  let found = [];
  if (isBad && threshold === chosen.threshold) found = chosen.defects;
  if (isBad && heats) {
    const peak = heats.data.reduce((a, b) => Math.max(a, b), 0);
    const cutoff = Math.min(255 * Math.max(strip.scale.at(threshold), 0), peak - 0.5); // the peak itself is always marked
    if (threshold !== chosen.threshold) {
      found = regions(heats, cutoff, chosen).map((region) => ({ ...region, score: Math.min(strip.scale.scoreAt(Math.min(region.heat, 0.999)), chosen.score) }));
      chosen.marked = found.length;
    }
    stage.outline($("show-outlines").checked ? cutoff : null);
  } else {
    stage.outline(null);
  }
  const lines = found.slice(0, MOST_LISTED).map((defect, i) => {
    const line = document.createElement("li");
    const [mark, place, score, size] = ["b", "span", "span", "small"].map((tag) => line.appendChild(document.createElement(tag)));
    mark.textContent = i + 1;
    place.textContent = `row ${defect.top}, column ${defect.left}`;
    score.textContent = number(defect.score);
    size.textContent = `${defect.height} × ${defect.width} px, area ${defect.area_px} px`;
    return line;
  });
  if (!lines.length) {
    const none = chosen.score <= threshold ? "None: the score is not above the threshold." : chosen.verdict === "failed" ? "Not inspected." : "…";
    lines.push(Object.assign(document.createElement("li"), { className: "none", textContent: none }));
  }
  $("defects").replaceChildren(...lines);
  $("defects-title").textContent = chosen.verdict === "setup" ? "Above the threshold" : found.length > 1 ? `${found.length} defects` : found.length ? "1 defect" : "Defects";
}

let isDrawing = false;
function setThreshold(value) {
  threshold = value;
  items.forEach(judge);
  if (isDrawing) return;
  isDrawing = true; // once a frame, however fast the slider moves
  requestAnimationFrame(() => {
    isDrawing = false;
    if (items.length) draw();
  });
}

function step(by) {
  const order = table.sorted(items), next = order[order.indexOf(chosen) + by];
  if (next) choose(next);
}

function download() {
  if (!items.length) return;
  const text = csv(table.sorted(items), threshold, promisedRate(model.held_out_scores, threshold));
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href: url, download: `${model.name}_verdicts.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function clear() {
  queue.clear();
  items = [];
  chosen = heats = null;
  if (photoUrl) URL.revokeObjectURL(photoUrl);
  photoUrl = null;
  table.clear();
  strip.setRange([]);
  say("");
  document.title = "intra – inspection";
  draw();
}

function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function toggleHeat() {
  $("opacity").value = $("opacity").value > 0 ? 0 : 60;
  $("opacity").dispatchEvent(new Event("input"));
}

function listen() {
  const files = (input) => [...input.files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
  for (const [button, input] of [["add-photos", "photos"], ["add-folder", "folder"]]) {
    $(button).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", () => {
      add(files($(input)));
      $(input).value = ""; // the same file may be chosen again
    });
  }
  const over = (isOver) => (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", isOver);
  };
  document.addEventListener("dragover", over(true));
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? over(false)(event));
  document.addEventListener("drop", async (event) => {
    over(false)(event);
    try {
      add(await dropped(event.dataTransfer));
    } catch {
      say("What was dropped cannot be read.");
    }
  });
  $("opacity").addEventListener("input", () => {
    stage.setOpacity($("opacity").value / 100);
    $("opacity-value").textContent = `${$("opacity").value} %`;
  });
  $("show-outlines").addEventListener("change", drawMarks);
  $("threshold").addEventListener("input", () => setThreshold(strip.read()));
  $("reset").addEventListener("click", () => setThreshold(model.threshold.value));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("download").addEventListener("click", download);
  $("clear").addEventListener("click", clear);
  addEventListener("resize", () => items.length && drawThreshold());
  document.addEventListener("keydown", press);
}

const KEYS = {
  a: () => $("add-photos").click(),
  f: () => $("add-folder").click(),
  ArrowUp: () => step(-1),
  ArrowDown: () => step(1),
  ArrowLeft: () => stage.setCut(stage.cut - 5),
  ArrowRight: () => stage.setCut(stage.cut + 5),
  r: () => stage.setCut(stage.cut > 0 ? 0 : 100),
  h: toggleHeat,
  o: () => $("show-outlines").click(),
  "[": () => nudge(-1),
  "]": () => nudge(1),
  0: () => setThreshold(model.threshold.value),
  d: download,
};

/** One hundredth of the strip. */
function nudge(by) {
  $("threshold").value = Number($("threshold").value) + 10 * by;
  setThreshold(strip.read());
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.type === "range" && event.key.startsWith("Arrow")) return; // the slider's own
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || (!items.length && !["a", "f"].includes(event.key.toLowerCase()))) return;
  event.preventDefault();
  act();
}
