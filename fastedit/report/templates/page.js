"use strict";
for (const box of document.querySelectorAll("[data-gallery]")) {
  const cards = Array.from(box.querySelectorAll(".card"));
  const buttons = Array.from(box.querySelectorAll(".filters button"));
  const search = box.querySelector("input");
  const shown = box.querySelector("[data-shown]");
  let kind = "all";
  const update = () => {
    const words = search.value.trim().toLowerCase();
    let count = 0;
    for (const card of cards) {
      const fits = (kind === "all" || card.dataset.kinds.split(" ").includes(kind))
        && (!words || card.textContent.toLowerCase().includes(words));
      card.hidden = !fits;
      count += fits ? 1 : 0;
    }
    shown.textContent = String(count);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
  };
  for (const button of buttons) button.addEventListener("click", () => { kind = button.dataset.kind; update(); });
  search.addEventListener("input", update);
  box.querySelector(".filters").hidden = false;
  update();
}
