// The threshold: what it promises, where it lies, and the strip on which people move it.

const SVG = "http://www.w3.org/2000/svg";
const STEPS = 1000; // of the range input

/** The share of good parts that a threshold promises to reject at most: `given_threshold` in calibration.py. */
export function promisedRate(heldOut, threshold) {
  return (heldOut.filter((score) => score > threshold).length + 1) / (heldOut.length + 1);
}

/** A share for people, never rounded down to nothing. */
export function percent(share) {
  const value = share * 100;
  return `${value >= 10 ? value.toFixed(0) : value.toFixed(1)} %`;
}

/** A score for people. */
export function number(score) {
  return score.toPrecision(4);
}

/** The scale of the report (evaluation/pictures.py: heat), for negative scores too: in (-1, 1), the threshold at 0.5. */
export class Scale {
  constructor(threshold) {
    this.unit = Math.abs(threshold) || Number.MIN_VALUE;
  }
  at(score) {
    return score / (Math.abs(score) + this.unit);
  }
  scoreAt(place) {
    return (place * this.unit) / (1 - Math.abs(place));
  }
}

/** The strip: held-out good photos above the line, inspected photos below, and the threshold across. */
export class Strip {
  constructor(svg, input, heldOut, trained) {
    Object.assign(this, { svg, input, heldOut, trained, scale: new Scale(trained) });
    this.setRange([]);
  }

  /** The range holds all that was scored, with some room: a threshold may reject everything or nothing. */
  setRange(scores) {
    const places = [...this.heldOut, this.trained, ...scores].map((score) => this.scale.at(score));
    const low = Math.min(...places), high = Math.max(...places), room = Math.max((high - low) * 0.08, 0.02);
    this.low = Math.max(low - room, -0.995);
    this.high = Math.min(high + room, 0.995);
  }

  fraction(score) {
    return Math.min(Math.max((this.scale.at(score) - this.low) / (this.high - this.low), 0), 1);
  }

  /** The score at the range input's place. */
  read() {
    return this.scale.scoreAt(this.low + (this.input.value / STEPS) * (this.high - this.low));
  }

  /** Draws all; `items` are inspected photos, `chosen` the one that is looked at. */
  draw(items, threshold, chosen) {
    this.input.value = Math.round(this.fraction(threshold) * STEPS);
    this.input.setAttribute("aria-valuetext", `threshold ${number(threshold)}`);
    const width = this.svg.clientWidth || 320, left = 8, span = width - 2 * left;
    const x = (score) => left + span * this.fraction(score);
    const shapes = [shape("line", { class: "base", x1: 0, x2: width, y1: 46, y2: 46 })];
    const pile = new Map(); // dots that would cover each other are piled up
    const dot = (score, kind, up) => {
      const column = `${up}${Math.round(x(score) / 7)}`, height = pile.get(column) ?? 0;
      pile.set(column, height + 1);
      const y = 46 + (up ? -1 : 1) * (8 + 8 * Math.min(height, up ? 4 : 6));
      return shape("circle", { class: kind, cx: x(score).toFixed(1), cy: y, r: 3.5 });
    };
    shapes.push(...this.heldOut.map((score) => dot(score, "held", true)));
    for (const item of items) {
      shapes.push(dot(item.score, item === chosen ? `${item.verdict} chosen` : item.verdict, false));
    }
    shapes.push(shape("line", { class: "cut", x1: x(threshold), x2: x(threshold), y1: 0, y2: 104 }));
    this.svg.replaceChildren(...shapes);
  }
}

function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
