// The control image and the image prompt: their fields. Knows nothing of requests.

const $ = (id) => document.getElementById(id);
// By id of the fields: the settings of the image and of its strength.
const KINDS = {
  control: ["control_image", "controlnet_conditioning_scale"],
  adapter: ["ip_adapter_image", "ip_adapter_scale"],
};
export const CONTROL_NUMBERS = Object.values(KINDS).map(([, strength]) => strength);
const images = { control: null, adapter: null }; // Blobs

export function setUpControl() {
  for (const id of Object.keys(KINDS)) {
    $(`${id}-file`).addEventListener("change", () => setImage(id, $(`${id}-file`).files[0] ?? null));
    $(`${id}-remove`).addEventListener("click", () => {
      setImage(id, null);
      $(`${id}-file`).focus();
    });
  }
}

/** Shows the fields for what a model has: its ControlNets and its IP-Adapter. */
export function offerControl({ controlnets = [], ip_adapter = null }) {
  const before = $("controlnet").value;
  $("controlnet").replaceChildren(...controlnets.map((name) => new Option(name)));
  if (controlnets.includes(before)) $("controlnet").value = before;
  const offered = { control: controlnets.length > 0, adapter: ip_adapter !== null };
  for (const id of Object.keys(KINDS)) {
    $(`${id}-field`).hidden = !offered[id];
    if (!offered[id]) setImage(id, null);
  }
}

/** The settings of the images that are set. */
export function controlSettings() {
  const settings = {};
  for (const [id, [image, strength]] of Object.entries(KINDS)) {
    if (images[id]) Object.assign(settings, { [image]: images[id], [strength]: $(strength).valueAsNumber });
  }
  if (images.control) settings.controlnet = $("controlnet").value;
  return settings;
}

/** Whether a strength counts: its image is set. */
export const isControlUsed = (strength) =>
  Object.entries(KINDS).some(([id, [, name]]) => name === strength && images[id]);

/** Fills the fields from `settings`, whose images may be absent. */
export function fillControl(settings) {
  for (const [id, [image]] of Object.entries(KINDS)) setImage(id, settings[image] ?? null);
  if (settings.controlnet) $("controlnet").value = settings.controlnet;
}

/** Sets the image of "control" or "adapter"; null removes it. */
export function setImage(id, image) {
  images[id] = $(`${id}-field`).hidden ? null : image;
  URL.revokeObjectURL($(`${id}-image`).src);
  if (images[id]) $(`${id}-image`).src = URL.createObjectURL(images[id]);
  else $(`${id}-image`).removeAttribute("src");
  for (const part of ["image", "remove", "strength"]) $(`${id}-${part}`).hidden = !images[id];
  $(`${id}-hint`).hidden = Boolean(images[id]);
  if (!images[id]) $(`${id}-file`).value = "";
}
