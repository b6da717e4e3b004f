// The batch as a table that sorts, and as a CSV file.

import { number } from "./threshold.js";

export const WORDS = { good: "good", bad: "defect", setup: "setup", failed: "not read", waiting: "waits" };
const ORDER = { bad: 0, setup: 1, failed: 2, good: 3, waiting: 4 };
const KEYS = {
  order: (item) => item.order,
  name: (item) => item.name,
  verdict: (item) => ORDER[item.verdict],
  score: (item) => item.score ?? -Infinity,
  defects: (item) => item.marked ?? -1,
  size: (item) => (item.width ?? 0) * (item.height ?? 0),
};
const DESCENDING_FIRST = new Set(["score", "defects", "size"]);

export class Table {
  constructor(body, heads, onChoose) {
    Object.assign(this, { body, heads, key: "order", sign: 1, rows: new Map() });
    for (const head of heads) {
      head.firstElementChild.addEventListener("click", () => this.sortBy(head.firstElementChild.dataset.key));
    }
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row) onChoose(row.item);
    });
  }

  sortBy(key) {
    this.sign = key === this.key ? -this.sign : DESCENDING_FIRST.has(key) ? -1 : 1;
    this.key = key;
    this.draw(this.items, this.chosen);
  }

  /** The items in the order of the rows. */
  sorted(items) {
    const value = KEYS[this.key];
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a < b ? -1 : a > b ? 1 : 0);
    return [...items].sort((a, b) => this.sign * compare(value(a), value(b)) || a.order - b.order);
  }

  draw(items, chosen) {
    Object.assign(this, { items, chosen });
    for (const head of this.heads) {
      const own = head.firstElementChild.dataset.key === this.key;
      head.setAttribute("aria-sort", own ? (this.sign > 0 ? "ascending" : "descending") : "none");
    }
    const rows = this.sorted(items).map((item) => this.row(item, item === chosen));
    const same = rows.length === this.body.children.length && rows.every((row, i) => row === this.body.children[i]);
    if (!same) this.body.replaceChildren(...rows); // moving rows is slow: only when their order changes
  }

  row(item, isChosen) {
    let row = this.rows.get(item);
    if (!row) {
      row = document.createElement("tr");
      row.item = item;
      for (const kind of ["", "text name", "text", "", "wide", "wide"]) row.insertCell().className = kind;
      row.cells[2].append(document.createElement("span"), document.createElement("span"));
      this.rows.set(item, row);
    }
    const [order, name, verdict, score, defects, size] = row.cells;
    order.textContent = item.order;
    name.textContent = item.name;
    name.title = item.error ?? "";
    verdict.firstChild.className = `badge ${item.verdict}`;
    verdict.firstChild.textContent = WORDS[item.verdict];
    verdict.lastChild.className = "reason";
    verdict.lastChild.textContent = item.setup_reason ?? "";
    score.textContent = item.score === undefined ? "–" : number(item.score);
    defects.textContent = item.marked ?? "–";
    size.textContent = item.width ? `${item.height} × ${item.width}` : "–";
    row.className = isChosen ? "chosen" : "";
    return row;
  }

  clear() {
    this.rows.clear();
    this.body.replaceChildren();
  }
}

/** The table as CSV (RFC 4180), in the order of the rows. */
export function csv(items, threshold, rate) {
  const head = ["photo", "verdict", "score", "p_value", "threshold", "promised_false_reject_rate", "height_px", "width_px", "defects",
    "setup_alarm", "setup_reason", "error"];
  const lines = items.map((item) => [
    item.name, WORDS[item.verdict], item.score, item.p_value, threshold, rate, item.height, item.width,
    item.score <= threshold ? 0 : item.marked, item.setup_alarm, item.setup_reason, item.error,
  ]);
  return [head, ...lines].map((line) => line.map(field).join(",")).join("\r\n") + "\r\n";
}

/** One field; a spreadsheet must not take a photo's name for a formula. */
function field(value) {
  const text = String(value ?? "");
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
