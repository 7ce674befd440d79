"use strict";
// The memory map: address against time on a canvas, and the pool at one instant as a strip below it.
(() => {
  const maps = JSON.parse(document.getElementById("maps").textContent);
  // Nine colours that people of every colour vision can tell apart (Paul Tol, bright and light schemes).
  const PALETTE = ["#4477AA", "#EE8866", "#44BB99", "#AA3377", "#CCBB44", "#66CCEE", "#228833", "#EE6677", "#BB99DD"];
  const CACHED = "rgba(0,158,115,0.30)";
  const [LEFT, BOTTOM, TOP] = [82, 30, 10];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const views = [];

  function hatch(context, colour, gap, width) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = gap;
    const pen = tile.getContext("2d");
    pen.strokeStyle = colour; pen.lineWidth = width;
    for (const shift of [-gap, 0, gap]) { pen.moveTo(shift, gap); pen.lineTo(shift + gap, 0); }
    pen.stroke();
    return context.createPattern(tile, "repeat");
  }

  // Tokens of a request that are written at a tick (before: just until then); between two points it grows evenly.
  function writtenAt(request, tick, before = false) {
    const points = request.written;
    if (!points.length || tick < points[0]) return 0;
    for (let i = 2; i < points.length; i += 2) {
      if (tick < points[i] || (before && tick === points[i])) {
        const [t0, n0, t1, n1] = [points[i - 2], points[i - 1], points[i], points[i + 1]];
        return t1 > t0 ? n0 + (n1 - n0) * (tick - t0) / (t1 - t0) : n1;
      }
    }
    return points[points.length - 1];
  }
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const count = (value) => Math.round(value).toLocaleString("en-US");

  function niceStep(span, most) {
    const raw = span / most, power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw);
  }

  class MemoryMap {
    constructor(place, data) {
      this.data = data;
      this.place = place;
      this.base = place.querySelector(".map-base");
      this.over = place.querySelector(".map-over");
      this.strip = place.querySelector(".map-strip");
      this.slider = place.querySelector("input");
      this.told = place.querySelector("output");
      this.requests = data.requests.map(([index, prompt, final, written, preempted], i) =>
        ({ index, prompt, final, written, preempted, colour: PALETTE[i % PALETTE.length] }));
      const unit = data.unit, flat = data.bands;
      this.bands = [];
      for (let i = 0; i < flat.length; i += 6) {
        this.bands.push({ request: flat[i], low: flat[i + 1] * unit, size: flat[i + 2] * unit, offset: flat[i + 3] * unit,
          begin: flat[i + 4], end: flat[i + 5] });
      }
      this.shared = [];
      for (let i = 0; i < data.shared.length; i += 5) {
        this.shared.push({ low: data.shared[i] * unit, size: data.shared[i + 1] * unit, users: data.shared[i + 2],
          begin: data.shared[i + 3], end: data.shared[i + 4] });
      }
      this.tick = Math.round(data.ticks / 2);
      this.reset();
      this.listen();
    }

    reset() {
      const [y0, y1] = this.data.view;
      Object.assign(this, { x0: 0, x1: this.data.ticks, y0, y1 });
    }

    listen() {
      let from = null;
      this.over.addEventListener("pointerdown", (event) => { from = [event.offsetX, event.offsetY]; });
      this.over.addEventListener("pointermove", (event) => {
        this.point = [event.offsetX, event.offsetY];
        if (from && event.buttons) { this.drag = [...from, ...this.point]; this.mark(); return; }
        setTick(Math.round(clamp(this.tickAt(event.offsetX), 0, this.data.ticks)));
      });
      this.over.addEventListener("pointerup", () => {
        if (this.drag) this.zoom(...this.drag);
        from = this.drag = null;
        this.mark();
      });
      this.over.addEventListener("pointerleave", () => { this.point = from = this.drag = null; this.mark(); });
      this.over.addEventListener("dblclick", () => { this.reset(); this.draw(); });
      this.slider.addEventListener("input", () => { this.point = null; setTick(Number(this.slider.value)); });
      this.place.querySelector(".map-whole")?.addEventListener("click", () => {
        this.reset(); [this.y0, this.y1] = this.data.drawn; this.draw();
      });
      this.place.querySelector(".map-fit").addEventListener("click", () => { this.reset(); this.draw(); });
    }

    zoom(xa, ya, xb, yb) {
      if (Math.abs(xa - xb) < 6 || Math.abs(ya - yb) < 6) return;
      const [x0, x1] = [this.tickAt(Math.min(xa, xb)), this.tickAt(Math.max(xa, xb))];
      const [y1, y0] = [this.slotAt(Math.min(ya, yb)), this.slotAt(Math.max(ya, yb))];
      Object.assign(this, { x0: Math.max(x0, 0), x1: Math.min(x1, this.data.ticks), 
        y0: Math.max(y0, this.data.drawn[0]), y1: Math.min(y1, this.data.drawn[1]) });
      this.draw();
    }

    tickAt(x) { return this.x0 + (x - LEFT) / (this.width - LEFT) * (this.x1 - this.x0); }
    slotAt(y) { return this.y0 + (this.height - BOTTOM - y) / (this.height - BOTTOM - TOP) * (this.y1 - this.y0); }
    x(tick) { return LEFT + (tick - this.x0) / (this.x1 - this.x0) * (this.width - LEFT); }
    y(slot) { return this.height - BOTTOM - (slot - this.y0) / (this.y1 - this.y0) * (this.height - BOTTOM - TOP); }
    seconds(tick) { return this.data.begin_s + (this.data.end_s - this.data.begin_s) * tick / this.data.ticks; }

    size(canvas) {
      const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
      canvas.width = Math.round(box.width * ratio); canvas.height = Math.round(box.height * ratio);
      const context = canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
      return context;
    }

    draw() {
      const box = this.base.getBoundingClientRect();
      [this.width, this.height] = [box.width, box.height];
      const context = this.size(this.base);
      this.waste = hatch(context, "rgba(110,110,110,0.55)", 7, 1);
      this.common = hatch(context, "rgba(0,0,0,0.75)", 5, 1.6);
      context.save();
      context.beginPath(); context.rect(LEFT, TOP, this.width - LEFT, this.height - TOP - BOTTOM); context.clip();
      context.fillStyle = style("--free"); context.fillRect(LEFT, 0, this.width, this.height);
      let painted = 0;
      for (const band of this.bands) painted += this.paint(context, band);
      for (const band of this.shared) this.fill(context, this.common, band, band.low, band.size);
      context.restore();
      this.axes(context);
      this.preemptions(context);
      this.base.dataset.painted = String(painted);
      this.mark();
    }

    fill(context, colour, band, low, slots) {
      const [x, top] = [this.x(band.begin), this.y(low + slots)];
      context.fillStyle = colour;
      context.fillRect(x, top, this.x(band.end) - x, this.y(low) - top);
    }

    // A request's band: what is never filled, what will be, what is written; thin bands in one colour.
    paint(context, band) {
      if (band.end < this.x0 || band.begin > this.x1 || band.low > this.y1 || band.low + band.size < this.y0) return 0;
      if (band.request < 0) { this.fill(context, CACHED, band, band.low, band.size); return 1; }
      const request = this.requests[band.request], thick = this.y(band.low) - this.y(band.low + band.size);
      if (thick < 3) {
        const half = writtenAt(request, (band.begin + band.end) / 2) > band.offset + band.size / 2;
        context.globalAlpha = half ? 1 : 0.45;
        this.fill(context, request.colour, band, band.low, band.size);
        context.globalAlpha = 1;
        return 1;
      }
      const used = clamp(request.final - band.offset, 0, band.size);
      context.globalAlpha = 0.16; this.fill(context, request.colour, band, band.low + used, band.size - used);
      context.globalAlpha = 0.42; this.fill(context, request.colour, band, band.low, used);
      context.globalAlpha = 1; this.fill(context, this.waste, band, band.low + used, band.size - used);
      const ticks = [band.begin];
      for (let i = 0; i < request.written.length; i += 2) {
        if (request.written[i] > band.begin && request.written[i] < band.end) ticks.push(request.written[i]);
      }
      ticks.push(band.end);
      context.beginPath();
      context.moveTo(this.x(band.begin), this.y(band.low));
      for (const tick of ticks) {
        const written = writtenAt(request, tick, tick === band.end) - band.offset;
        context.lineTo(this.x(tick), this.y(band.low + clamp(written, 0, band.size)));
      }
      context.lineTo(this.x(band.end), this.y(band.low));
      context.fillStyle = request.colour;
      context.fill();
      context.strokeStyle = style("--card"); context.lineWidth = 0.75;
      context.strokeRect(this.x(band.begin), this.y(band.low + band.size), this.x(band.end) - this.x(band.begin), thick);
      return 1;
    }

    axes(context) {
      context.fillStyle = style("--soft"); context.strokeStyle = style("--line"); context.lineWidth = 1;
      context.strokeRect(LEFT, TOP, this.width - LEFT - 0.5, this.height - TOP - BOTTOM);
      const [t0, t1] = [this.seconds(this.x0), this.seconds(this.x1)];
      const step = niceStep(t1 - t0, this.width / 110), decimals = Math.max(0, -Math.floor(Math.log10(step)));
      context.textAlign = "center";
      for (let t = Math.ceil(t0 / step) * step; t <= t1; t += step) {
        const x = LEFT + (t - t0) / (t1 - t0) * (this.width - LEFT);
        if (x < this.width - 14) context.fillText(`${t.toFixed(decimals)} s`, x, this.height - 10);
      }
      const per = this.data.unit, rise = niceStep((this.y1 - this.y0) / per, 6);
      context.textAlign = "right";
      for (let n = Math.ceil(this.y0 / per / rise) * rise; n <= this.y1 / per; n += rise) {
        context.fillText(n.toLocaleString("en-US"), LEFT - 6, clamp(this.y(n * per) + 4, TOP + 10, this.height - BOTTOM));
      }
      context.save();
      context.translate(12, (this.height - BOTTOM + TOP) / 2); context.rotate(-Math.PI / 2);
      context.textAlign = "center"; context.fillText(per > 1 ? `Block of ${per} tokens` : "Slot (token)", 0, 0);
      context.restore();
    }

    preemptions(context) {
      context.fillStyle = style("--ink");
      for (const request of this.requests) {
        for (const tick of request.preempted) {
          const x = this.x(tick);
          if (x < LEFT || x > this.width) continue;
          context.beginPath(); context.moveTo(x - 4, 0); context.lineTo(x + 4, 0); context.lineTo(x, 8); context.fill();
        }
      }
    }

    // What moves with the pointer and the slider: the line of the instant, one request's outline, the strip.
    mark() {
      const context = this.size(this.over), ink = style("--ink"), found = this.under();
      context.clearRect(0, 0, this.width, this.height);
      context.save();
      context.beginPath(); context.rect(LEFT, TOP, this.width - LEFT, this.height - TOP - BOTTOM); context.clip();
      if (found) {
        context.strokeStyle = ink; context.lineWidth = 1.5;
        for (const band of this.bands) {
          if (band.request !== found.request) continue;
          const x = this.x(band.begin), top = this.y(band.low + band.size);
          context.strokeRect(x, top, this.x(band.end) - x, Math.max(this.y(band.low) - top, 1));
        }
      }
      context.strokeStyle = ink; context.lineWidth = 1;
      context.beginPath(); context.moveTo(this.x(this.tick), 0); context.lineTo(this.x(this.tick), this.height); context.stroke();
      if (this.drag) {
        const [xa, ya, xb, yb] = this.drag;
        context.setLineDash([4, 3]); context.strokeRect(Math.min(xa, xb), Math.min(ya, yb), Math.abs(xa - xb), Math.abs(ya - yb));
      }
      context.restore();
      this.slider.value = String(this.tick);
      this.tell(this.now(), found);
    }

    under() {
      if (!this.point) return null;
      const slot = this.slotAt(this.point[1]);
      return this.bands.find((band) => band.request >= 0 && band.begin <= this.tick && this.tick < band.end &&
        band.low <= slot && slot < band.low + band.size);
    }

    // Draw the strip, and add up what it shows.
    now() {
      const context = this.size(this.strip), box = this.strip.getBoundingClientRect();
      const wide = box.width - LEFT, high = box.height - 2;
      const at = (slot) => LEFT + (slot - this.y0) / (this.y1 - this.y0) * wide;
      const bar = (colour, low, slots) => { context.fillStyle = colour; context.fillRect(at(low), 1, at(low + slots) - at(low), high); };
      const sums = { written: 0, reserved: 0, never: 0, cached: 0, shared: 0 }, live = new Set();
      context.clearRect(0, 0, box.width, box.height);
      context.save();
      context.beginPath(); context.rect(LEFT, 1, wide, high); context.clip();
      bar(style("--free"), this.y0, this.y1 - this.y0);
      const active = (band) => band.begin <= this.tick && this.tick < band.end;
      for (const band of this.bands) {
        if (!active(band)) continue;
        if (band.request < 0) { sums.cached += band.size; bar(CACHED, band.low, band.size); continue; }
        const request = this.requests[band.request];
        live.add(band.request);
        const used = clamp(request.final - band.offset, 0, band.size);
        const written = clamp(writtenAt(request, this.tick) - band.offset, 0, used);
        sums.written += written; sums.reserved += used - written; sums.never += band.size - used;
        context.globalAlpha = 0.16; bar(request.colour, band.low + used, band.size - used);
        context.globalAlpha = 0.42; bar(request.colour, band.low, used);
        context.globalAlpha = 1; bar(request.colour, band.low, written); bar(this.waste, band.low + used, band.size - used);
      }
      for (const band of this.shared) {
        if (!active(band)) continue;
        sums.shared += band.size; sums.written -= (band.users - 1) * band.size;
        bar(this.common, band.low, band.size);
      }
      context.restore();
      context.fillStyle = style("--soft"); context.textAlign = "right";
      context.fillText("Now", LEFT - 6, box.height / 2 + 4);
      return { ...sums, requests: live.size };
    }

    tell(sums, found) {
      const pool = this.data.drawn[1] - this.data.drawn[0], share = (slots) => `${(100 * slots / pool).toFixed(1)} %`;
      const free = pool - sums.written - sums.reserved - sums.never - sums.cached;
      const parts = [`${this.seconds(this.tick).toFixed(2)} s`, `${sums.requests} requests`, `written ${share(sums.written)}`,
        `will be filled ${share(sums.reserved)}`, `never filled ${share(sums.never)}`];
      if (sums.cached) parts.push(`cached ${share(sums.cached)}`);
      if (sums.shared) parts.push(`shared ${share(sums.shared)}`);
      parts.push(`free ${share(free)}`);
      let text = parts.join(" · ");
      if (found) {
        const request = this.requests[found.request];
        text += `\nRequest ${request.index}: prompt ${count(request.prompt)}, fills ${count(request.final)} slots in the end, ` +
          `${count(writtenAt(request, this.tick))} written; this run: ${count(found.size)} slots from ${count(found.low)} on`;
      }
      this.told.textContent = text;
    }
  }

  function setTick(tick) {
    for (const view of views) { view.tick = tick; view.mark(); }
  }

  for (const [i, data] of maps.entries()) views.push(new MemoryMap(document.getElementById(`map-${i}`), data));
  const drawAll = () => views.forEach((view) => view.draw());
  drawAll();
  window.addEventListener("resize", drawAll);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.documentElement.dataset.maps = String(views.length);
})();
