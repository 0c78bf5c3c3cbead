"use strict";
(() => {
  const all = (what, at = document) => [...at.querySelectorAll(what)];
  const one = (id) => document.getElementById(id);
  const data = JSON.parse(one("numbers").textContent);

  // ---- values on hover, touch and keys

  const tip = one("tip"), said = one("said"), words = new WeakMap();
  for (const mark of all(".m")) {
    const title = mark.querySelector("title");
    words.set(mark, title.textContent);
    title.remove(); // else the browser's own box would lie over ours
  }
  let here = null;
  const hide = () => {
    if (here) here.classList.remove("here");
    here = null;
    tip.hidden = true;
  };
  const middle = (mark) => {
    const box = (mark.querySelector(".dot") || mark).getBoundingClientRect();
    return [(box.left + box.right) / 2, (box.top + box.bottom) / 2, box];
  };
  const show = (mark, aloud) => {
    hide();
    here = mark;
    mark.classList.add("here");
    tip.textContent = words.get(mark);
    tip.hidden = false;
    const [x, , box] = middle(mark), width = document.documentElement.clientWidth;
    const left = Math.min(Math.max(x - tip.offsetWidth / 2, 4), width - tip.offsetWidth - 4);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : box.bottom + 8) + scrollY}px`;
    if (aloud) said.textContent = words.get(mark);
  };
  const seen = (plot) => all(".m", plot).filter((mark) => mark.getClientRects().length);
  for (const plot of all(".plot")) {
    const near = (event) => {
      let best = null, least = 24;
      for (const mark of seen(plot)) {
        const [x, y, box] = middle(mark);
        const inside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
        const far = inside ? 0 : Math.hypot(event.clientX - x, event.clientY - y);
        if (far < least) [best, least] = [mark, far];
      }
      if (best && best !== here) show(best, false);
      if (!best) hide();
    };
    plot.addEventListener("pointermove", near);
    plot.addEventListener("pointerdown", near);
    plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const marks = seen(plot), at = marks.indexOf(here);
      const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at < 0 ? marks.length - 1 : at - 1, ArrowUp: at < 0 ? marks.length - 1 : at - 1, Home: 0, End: marks.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (next === undefined || !marks.length) return;
      event.preventDefault();
      show(marks[(next + marks.length) % marks.length], true);
    });
  }

  // ---- the harm budget: the rule of Grid.needed, by the upper ends

  const within = (harm, budget) => harm !== null && harm <= budget * (1 + 1e-12);
  const held = (model, j, budget) => {
    const n = model.depth.length;
    let i = 0;
    while (i < n && within(model.upper[i][j], budget)) i++;
    const open = i === n || (i > 0 && model.upper[i][j] === null);
    return { depth: i ? model.depth[i - 1] : null, open, all: i === n };
  };
  const read = (found) => (found.depth === null ? "none" : `${found.open ? "at least " : ""}${found.depth}`);
  const forced = (k) => `${k} forced token${k === 1 ? "" : "s"}`;
  const after = (k) => (k ? `after ${forced(k)}` : "without forcing");
  const sentence = (model, found) => {
    const read0 = read(found[0]), first = model.depth[0], last = model.depth.at(-1), single = model.depth.length === 1;
    const one = model.width[0] === 1, many = one ? "one answer" : `${model.width[0]} answers`, holds = one ? "holds" : "hold";
    const full = found.findIndex((f) => f.all), toAll = last ? ` for all ${forced(last)}` : "";
    let start = `${many} ${holds} up to ${read0} forced token${found[0].depth === 1 ? "" : "s"}`;
    if (read0 === "none") start = `${many} ${one ? "does" : "do"} not hold, not even ${after(first)}`;
    else if (single || read0 === "0") start = `${many} ${holds} ${single ? "" : "only "}${after(first)}`;
    if (full === 0) return `${start}, the most that was measured.`;
    if (full > 0) return `${start}; ${model.width[full]} answers are enough${toAll}.`;
    return `${start}; no measured number of answers is enough${toAll}.`;
  };
  const oneIn = (budget) => {
    if (!(budget > 0)) return "never";
    const many = 1 / budget;
    return `1 answer in ${many >= 10 ? Math.round(many).toLocaleString("en") : many.toFixed(1).replace(/\.0$/, "")}`;
  };
  const number = one("budget"), slider = one("slider");
  const place = (budget) => {
    data.models.forEach((model, m) => {
      const map = one(`map-${m}`), found = model.width.map((_, j) => held(model, j, budget));
      all("tbody tr", map).forEach((row, i) => all("td", row).forEach((cell, j) => {
        if (!model.blank[i][j]) cell.className = within(model.upper[i][j], budget) ? "ok" : "over";
      }));
      all("tfoot td", map).forEach((cell, j) => { cell.textContent = read(found[j]); });
      one(`answer-${m}`).textContent = sentence(model, found);
    });
    const short = String(Number(budget.toPrecision(3)));
    for (const said of all(".budget-said")) said.textContent = `${short} (${oneIn(budget)})`;
    slider.setAttribute("aria-valuetext", `${short}, ${oneIn(budget)}`);
    for (const line of all("[data-level=budget]")) {
      const [low, high, bottom, top] = line.ownerSVGElement.dataset.y.split(" ").map(Number);
      const y = bottom - ((budget - low) / (high - low)) * (bottom - top);
      line.setAttribute("d", line.getAttribute("d").replace(/^(M\S+) \S+?(?=H)/, `$1 ${y.toFixed(1)}`));
      line.style.display = y < top - 1 ? "none" : "";
    }
  };
  const start = data.budget;
  slider.value = Math.log10(Math.max(start, 1e-4));
  number.value = start;
  slider.addEventListener("input", () => {
    const budget = Number((10 ** Number(slider.value)).toPrecision(2));
    number.value = budget;
    place(budget);
  });
  number.addEventListener("input", () => {
    const budget = Number(number.value);
    const good = number.value !== "" && budget >= 0 && budget <= 1;
    number.setAttribute("aria-invalid", String(!good));
    if (!good) return;
    slider.value = Math.log10(Math.max(budget, 1e-4));
    place(budget);
  });
  one("controls").hidden = false;

  // ---- paper: what is folded up is printed too

  let shut = [];
  addEventListener("beforeprint", () => {
    shut = all("details:not([open])");
    for (const folded of shut) folded.open = true;
  });
  addEventListener("afterprint", () => {
    for (const folded of shut) folded.open = false;
  });
})();
