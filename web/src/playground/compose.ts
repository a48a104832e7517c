// What the playground sends: examples and text as one prompt, and the same request for other programs.
import type { Settings, SettingValue } from '../lib/types.ts'

export interface Example {
  input: string
  output: string
}

export interface Labels {
  input: string
  output: string
}

/** The text that the model reads. Without examples it is `text` as it stands; with them `text` is one more input. */
export function compose(examples: readonly Example[], labels: Labels, text: string): string {
  const shown = examples.filter(({ input, output }) => input.trim() && output.trim())
  if (!shown.length) return text
  const turn = (input: string, output: string): string => `${labels.input} ${input.trim()}\n${labels.output}${output && ` ${output.trim()}`}`
  return [...shown.map(({ input, output }) => turn(input, output)), turn(text, '')].join('\n\n')
}

// How /v1/completions names what it shares with OpenAI's; the others keep their names.
const OPENAI: Record<string, string> = { max_tokens_to_generate: 'max_tokens', top_logprobs: 'logprobs', stop_sequences: 'stop' }

/** The body of the same request to /v1/completions. */
export function completionBody(model: string, prompt: string, settings: Settings): Record<string, SettingValue> {
  const body: Record<string, SettingValue> = { model, prompt }
  for (const [name, value] of Object.entries(settings)) {
    if (value === null || (Array.isArray(value) && !value.length) || (name === 'top_logprobs' && !value)) continue
    if (name === 'do_sample') {
      if (!value) body['temperature'] = 0
    } else if (!(name === 'temperature' && settings['do_sample'] === false)) body[OPENAI[name] ?? name] = value
  }
  return body
}

export function asCurl(origin: string, body: object, needsKey: boolean): string {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''")
  const key = needsKey ? ' \\\n  -H "Authorization: Bearer $COROLLA_KEY"' : ''
  return `curl ${origin}/v1/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${json}'\n`
}

const KNOWN = new Set(['model', 'prompt', 'max_tokens', 'temperature', 'top_p', 'seed', 'stop', 'logprobs'])

export function asPython(origin: string, body: Record<string, SettingValue>, needsKey: boolean): string {
  const literal = (value: SettingValue): string =>
    value === null ? 'None' : typeof value === 'boolean' ? (value ? 'True' : 'False') : JSON.stringify(value) // a JSON string is a Python one
  const known = Object.entries(body).filter(([name]) => KNOWN.has(name))
  const extra = Object.entries(body).filter(([name]) => !KNOWN.has(name))
  const lines = known.map(([name, value]) => `    ${name}=${literal(value)},`)
  if (extra.length) lines.push(`    extra_body={${extra.map(([name, value]) => `${JSON.stringify(name)}: ${literal(value)}`).join(', ')}},`)
  const key = needsKey ? 'os.environ["COROLLA_KEY"]' : '"none"'
  return `${needsKey ? 'import os\n\n' : ''}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
completion = client.completions.create(
${lines.join('\n')}
)
print(completion.choices[0].text)
`
}
