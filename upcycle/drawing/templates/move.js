"use strict";
(() => {
  const svg = document.querySelector("svg.graph");
  const whole = svg.viewBox.baseVal;
  const all = { x: 0, y: 0, width: whole.width, height: whole.height };
  svg.removeAttribute("width");
  svg.removeAttribute("height");
  const enlarge = (factor, x, y) => {
    const width = Math.min(Math.max(whole.width / factor, 60), all.width * 4);
    const share = width / whole.width;
    whole.x = x - (x - whole.x) * share;
    whole.y = y - (y - whole.y) * share;
    whole.width = width;
    whole.height *= share;
  };
  const place = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY);
    return point.matrixTransform(svg.getScreenCTM().inverse());
  };
  const show = (x, y, width, height) => {
    whole.x = x;
    whole.y = y;
    whole.width = width;
    whole.height = height;
  };
  const fit = () => show(0, 0, all.width, all.height);
  const begin = () => {
    const width = Math.max(all.width, svg.clientWidth);
    show((all.width - width) / 2, 0, width, width * svg.clientHeight / svg.clientWidth);
  };
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = place(event);
    enlarge(Math.exp(-event.deltaY / 400), x, y);
  }, { passive: false });
  let held = null;
  svg.addEventListener("pointerdown", (event) => {
    held = place(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (held === null) return;
    const now = place(event);
    whole.x += held.x - now.x;
    whole.y += held.y - now.y;
  });
  svg.addEventListener("pointerup", () => { held = null; });
  svg.addEventListener("pointercancel", () => { held = null; });
  const middle = (factor) => enlarge(factor, whole.x + whole.width / 2, whole.y + whole.height / 2);
  const moves = {
    "+": () => middle(1.25),
    "-": () => middle(0.8),
    "0": fit,
    ArrowDown: () => { whole.y += whole.height / 8; },
    ArrowUp: () => { whole.y -= whole.height / 8; },
    ArrowRight: () => { whole.x += whole.width / 8; },
    ArrowLeft: () => { whole.x -= whole.width / 8; },
  };
  document.addEventListener("keydown", (event) => {
    if (event.key in moves && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      moves[event.key]();
    }
  });
  for (const button of document.querySelectorAll("button[data-key]")) {
    button.addEventListener("click", () => moves[button.dataset.key]());
  }
  document.body.classList.add("moves");
  begin();
})();
