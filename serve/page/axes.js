// The axes of an X/Y plot: their values from text, and what a value changes. Knows no page.

const LORA = /<lora:([^:>]+)(?::[^>]*)?>/;
export const MAX_VALUES = 16; // of one axis

/** By name: `parse(values, settings)` throws an Error for values that do not fit; `apply(settings, value)`. */
export const AXES = {
  Sampler: { parse: (values, _, samplers) => values.map((value) => findSampler(value, samplers)), field: "scheduler" },
  Steps: { parse: numbers(1, 1000, true), field: "num_inference_steps" },
  "Guidance scale": { parse: numbers(1, 100), field: "guidance_scale" },
  Seed: { parse: seeds, field: "seed" },
  "Feature reuse": { parse: numbers(1, 100, true), field: "feature_reuse" },
  "Output reuse": { parse: numbers(1, 100, true), field: "output_reuse" },
  "LoRA weight": {
    parse: (values, { prompt }) => {
      if (!LORA.test(prompt)) throw new Error("LoRA weight: the prompt names no LoRA.");
      return numbers(-10, 10)(values);
    },
    apply: (settings, weight) => ({
      ...settings,
      prompt: settings.prompt.replace(LORA, (_, name) => `<lora:${name}:${weight}>`),
    }),
  },
  "Prompt S/R": {
    parse: (values, { prompt }) => {
      if (!prompt.includes(values[0])) throw new Error(`Prompt S/R: “${values[0]}” is not in the prompt.`);
      return values;
    },
    apply: (settings, value, [sought]) => ({ ...settings, prompt: settings.prompt.replaceAll(sought, value) }),
  },
};

function numbers(min, max, integer = false) {
  return (values) => values.map((value) => {
    const number = Number(value);
    if (number >= min && number <= max && (!integer || Number.isInteger(number))) return number;
    throw new Error(`${value}: expected ${integer ? "a whole number" : "a number"} from ${min} to ${max}.`);
  });
}

function seeds(values) {
  const wrong = values.find((value) => !/^\d{1,20}$/.test(value) || BigInt(value) > 2n ** 64n - 1n);
  if (wrong) throw new Error(`${wrong}: expected a seed from 0 to ${2n ** 64n - 1n}.`);
  return values;
}

function findSampler(value, samplers) {
  const sought = value.toLowerCase();
  const sampler = samplers.find(({ name, aliases }) => [name, ...aliases].some((n) => n.toLowerCase() === sought));
  if (!sampler) throw new Error(`Unknown sampler ${value}.`);
  return sampler.name;
}

/** {name, values} of an axis; one empty value for none. Throws an Error with a message for the user. */
export function parseAxis(name, text, settings, samplers) {
  if (!name) return { name: "", values: [""] };
  const values = text.split(",").map((value) => value.trim()).filter(Boolean);
  if (!values.length) throw new Error(`${name}: enter values, separated by commas.`);
  if (values.length > MAX_VALUES) throw new Error(`${name}: ${values.length} values; expected at most ${MAX_VALUES}.`);
  return { name, values: AXES[name].parse(values, settings, samplers) };
}

/** The settings with one value of an axis. */
export function applyAxis(settings, { name, values }, value) {
  if (!name) return settings;
  const { apply, field } = AXES[name];
  return apply ? apply(settings, value, values) : { ...settings, [field]: value };
}
