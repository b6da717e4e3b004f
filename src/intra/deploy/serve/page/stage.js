// The photo and its repaired image on top of each other, the heatmap, and the outlines at any threshold.

// As in evaluation/pictures.py, so that colours mean the same on the page and in the report.
const INFERNO = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const VISIBLE_FROM = 1 / 3, FULL_AT = 2 / 3;
const OUTLINE = [255, 96, 0];
const SIDE = 1024; // px of the longer side of the outlines: they stay smooth on small photos
const LINE = 5; // px of those

export class Stage {
  constructor(nodes) {
    Object.assign(this, nodes); // stage, frame, photo, repaired, heat, outlines
    this.setCut(50);
    this.photo.addEventListener("load", () => { // before the verdict is there, which knows the size too
      this.frame.style.setProperty("--ratio", this.photo.naturalWidth / this.photo.naturalHeight);
    });
    const drag = (event) => {
      const box = this.frame.getBoundingClientRect();
      this.setCut(((event.clientX - box.left) / box.width) * 100);
    };
    this.stage.addEventListener("pointerdown", (event) => {
      this.stage.setPointerCapture(event.pointerId);
      drag(event);
    });
    this.stage.addEventListener("pointermove", (event) => {
      if (this.stage.hasPointerCapture(event.pointerId)) drag(event);
    });
  }

  /** Left of the cut, in percent, is the photo; right of it the repaired image. */
  setCut(percent) {
    this.cut = Math.min(Math.max(percent, 0), 100);
    this.frame.style.setProperty("--cut", `${this.cut}%`);
    this.frame.classList.toggle("repaired-alone", this.cut < 15);
    this.frame.classList.toggle("photo-alone", this.cut > 85);
    this.stage.setAttribute("aria-valuenow", Math.round(this.cut));
    this.stage.setAttribute("aria-valuetext", `${Math.round(this.cut)} % photo`);
  }

  setShown(isShown) {
    this.frame.hidden = !isShown;
  }

  setOpacity(share) {
    this.heat.style.opacity = share;
  }

  /** Shows a photo; without a heat picture (not inspected yet) the photo alone. Returns the heats, or null. */
  async show(photoUrl, size, repairedUrl, heatUrl) {
    this.photo.src = photoUrl;
    this.values = null;
    for (const canvas of [this.heat, this.outlines]) canvas.width = canvas.width; // wipes it
    this.repaired.hidden = !repairedUrl;
    if (repairedUrl) this.repaired.src = repairedUrl;
    else this.repaired.removeAttribute("src");
    if (size.width) this.frame.style.setProperty("--ratio", size.width / size.height);
    if (!heatUrl) return null;
    const picture = await loaded(heatUrl);
    if (this.photo.src !== new URL(photoUrl, location.href).href) return null; // another photo is shown by now
    this.picture = picture;
    this.values = pixels(picture, picture.naturalWidth, picture.naturalHeight);
    this.paint();
    return this.values;
  }

  paint() {
    const { data, width, height } = this.values;
    this.heat.width = width;
    this.heat.height = height;
    const image = new ImageData(width, height);
    for (let i = 0; i < data.length; i++) image.data.set(COLOURS[data[i]], 4 * i);
    this.heat.getContext("2d").putImageData(image, 0, 0);
  }

  /** Lines around what lies above a heat; null wipes them. */
  outline(cutoff) {
    const canvas = this.outlines;
    if (!this.values || cutoff === null) {
      canvas.width = canvas.width;
      return;
    }
    const scale = SIDE / Math.max(this.values.width, this.values.height);
    const width = Math.round(this.values.width * scale), height = Math.round(this.values.height * scale);
    const { data } = pixels(this.picture, width, height);
    const inside = Uint8Array.from(data, (heat) => heat > cutoff);
    const grown = spread(spread(inside, width, height, 1), width, height, width);
    canvas.width = width;
    canvas.height = height;
    const image = new ImageData(width, height);
    for (let i = 0; i < grown.length; i++) if (grown[i] && !inside[i]) image.data.set([...OUTLINE, 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

/** Regions above a heat, in px of the photo, the highest heat first: what `Detector` calls defects. */
export function regions({ data, width, height }, cutoff, size) {
  const seen = new Uint8Array(data.length), found = [];
  const down = size.height / height, across = size.width / width;
  for (let start = 0; start < data.length; start++) {
    if (seen[start] || data[start] <= cutoff) continue;
    const region = { top: height, left: width, bottom: 0, right: 0, area: 0, heat: 0 }, open = [start];
    seen[start] = 1;
    while (open.length) {
      const at = open.pop(), row = Math.floor(at / width), col = at % width;
      region.top = Math.min(region.top, row);
      region.bottom = Math.max(region.bottom, row + 1);
      region.left = Math.min(region.left, col);
      region.right = Math.max(region.right, col + 1);
      region.area += 1;
      region.heat = Math.max(region.heat, data[at]);
      for (let r = Math.max(row - 1, 0); r <= Math.min(row + 1, height - 1); r++) {
        for (let c = Math.max(col - 1, 0); c <= Math.min(col + 1, width - 1); c++) {
          const next = r * width + c;
          if (!seen[next] && data[next] > cutoff) {
            seen[next] = 1;
            open.push(next);
          }
        }
      }
    }
    found.push({
      top: Math.round(region.top * down), left: Math.round(region.left * across), height: Math.round((region.bottom - region.top) * down),
      width: Math.round((region.right - region.left) * across), area_px: Math.round(region.area * down * across), heat: region.heat / 255,
    });
  }
  return found.sort((a, b) => b.heat - a.heat);
}

const COLOURS = Array.from({ length: 256 }, (_, heat) => {
  const place = (heat / 255) * (INFERNO.length - 1), low = Math.min(Math.floor(place), INFERNO.length - 2);
  const colour = INFERNO[low].map((value, i) => value + (INFERNO[low + 1][i] - value) * (place - low));
  const opacity = Math.min(Math.max((heat / 255 - VISIBLE_FROM) / (FULL_AT - VISIBLE_FROM), 0), 1);
  return [...colour.map(Math.round), Math.round(255 * opacity)];
});

/** Every pixel within LINE of a marked one, along one direction. */
function spread(marked, width, height, step) {
  const out = new Uint8Array(marked.length), across = step === 1;
  for (let row = 0; row < height; row++) {
    for (let col = 0; col < width; col++) {
      const at = row * width + col;
      if (!marked[at]) continue;
      const back = Math.min(LINE, across ? col : row), on = Math.min(LINE, across ? width - 1 - col : height - 1 - row);
      for (let k = -back; k <= on; k++) out[at + k * step] = 1;
    }
  }
  return out;
}

async function loaded(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  return picture;
}

/** The grey values of a picture, drawn at a size. */
function pixels(picture, width, height) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  const rgba = context.getImageData(0, 0, width, height).data;
  return { data: Uint8Array.from({ length: width * height }, (_, i) => rgba[4 * i]), width, height };
}
