// Photos to the server and back: what was dropped, a few at a time, again when the server is busy.

const AT_A_TIME = 3; // requests: enough to keep the server busy, few enough to leave room for others
const TRIES = 5; // of one photo, while the server is too busy
const PHOTO = /\.(avif|bmp|gif|jp2|j2k|jpe?g|jfif|png|pgm|ppm|pnm|pbm|tiff?|webp)$/i;

/** Files of a drop, those in dropped folders too, each as {file, name}. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, name: file.name }));
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

async function walk(entry, folder, found) {
  const name = folder + entry.name;
  if (entry.isFile) {
    found.push({ file: await new Promise((done, failed) => entry.file(done, failed)), name });
    return;
  }
  const reader = entry.createReader();
  for (;;) { // a reader gives a hundred at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) return;
    for (const inner of some) await walk(inner, `${name}/`, found);
  }
}

/** Whether a file may be a photo; others in a folder are passed over. */
export function isPhoto({ file, name }) {
  return !/(^|\/)\./.test(name) && (PHOTO.test(name) || file.type.startsWith("image/"));
}

/** The server's verdict; throws an Error with a sentence for people. Tries again a few times when the server says so. */
export async function inspect(file, name, limits, pictures = "repaired,heat") {
  if (file.size > limits.upload_bytes) {
    throw new Error(`it has ${(file.size / 2 ** 20).toFixed(0)} MiB; the server takes ${(limits.upload_bytes / 2 ** 20).toFixed(0)}`);
  }
  const query = new URLSearchParams({ name, pictures });
  for (let tried = 1; ; tried++) {
    let answer;
    try {
      answer = await fetch(`/inspect?${query}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    } catch {
      throw Object.assign(new Error("the server does not answer"), { isServer: true });
    }
    const wait = answer.headers.get("Retry-After");
    if (answer.status === 503 && wait && tried < TRIES) {
      await pause(Number(wait) * (1 + Math.random() / 2)); // not all at once
      continue;
    }
    const said = await answer.json().catch(() => ({ detail: `the server answered ${answer.status}` }));
    if (!answer.ok) throw new Error(String(said.detail));
    return said;
  }
}

/** Runs `work` on items in their order, a few at a time; items may be added at any time. */
export class Queue {
  constructor(work) {
    Object.assign(this, { work, items: [], running: 0 });
  }
  add(items) {
    this.items.push(...items);
    while (this.running < AT_A_TIME && this.items.length) this.next();
  }
  clear() {
    this.items = [];
  }
  async next() {
    this.running += 1;
    while (this.items.length) await this.work(this.items.shift());
    this.running -= 1;
  }
}

function pause(seconds) {
  return new Promise((done) => setTimeout(done, seconds * 1000));
}
