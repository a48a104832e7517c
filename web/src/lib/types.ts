// What docs/api.md says of /api/ui, in types.

export interface Model {
  id: string
  family: string
  blocks: number
  context: number
  vocabulary: number
  template: string
}

export interface Template {
  name: string
  about: string
  system: string
}

export interface SoftPrompt {
  id: string
  name: string
  model: string | null
  tokens: number
  deep: boolean
}

export interface SettingInfo {
  name: string
  label: string
  about: string
  type: 'integer' | 'number' | 'boolean' | 'text' | 'list'
  minimum: number | null
  maximum: number | null
  exclusive_minimum?: boolean | null
  step: number | null
  default: SettingValue
  chat_default: SettingValue
}

export type SettingValue = number | boolean | string | string[] | null
export type Settings = Record<string, SettingValue>

export interface ServerState {
  version: string
  login: 'none' | 'needed' | 'done'
  name: string | null
  models: Model[]
  templates: Template[]
  prompts: SoftPrompt[]
  settings: SettingInfo[]
}

export type MessageState = 'done' | 'writing' | 'stopped' | 'interrupted' | 'failed'

export interface Stats {
  ttft: number | null // seconds to the first token
  tokens: number
  tokens_per_second: number | null
  prompt_tokens?: number
  cached_tokens?: number
}

export interface Message {
  id: string
  parent: string | null
  role: 'user' | 'assistant'
  text: string
  state: MessageState
  created: string
  finish: 'stop' | 'length' | null
  stats: Stats | null
  error: string | null
  notices: string[]
}

/** What a conversation is held with; null means the model's own. */
export interface Manner {
  model: string | null
  system: string | null
  template: string | null
  prompt: string | null
  settings: Settings
}

export interface Conversation extends Manner {
  id: string
  title: string
  created: string
  updated: string
  leaf: string | null
}

export interface ConversationSummary {
  id: string
  title: string
  model: string | null
  created: string
  updated: string
  found: string | null
}

export interface TopToken {
  id: number
  text: string
  logprob: number
}

export interface PlayedToken extends TopToken {
  top: TopToken[]
}

export interface PlayDone {
  finish: string
  tokens: number
  prompt_tokens: number
  cached_tokens: number
  ttft: number | null
  tokens_per_second: number | null
}

export interface Server {
  peer: string
  name: string
  start: number
  end: number
  state: 'ready' | 'joining' | 'draining'
  throughput: number
  sessions: number
  cache_free: number
  dtype: string
  weights: string
  version: string
  next_rtts: Record<string, number>
  rtt_ms: number | null
}

export interface SwarmModel {
  id: string
  blocks: number
  missing: [number, number][]
  join: string
  servers: Server[]
}

export interface Swarm {
  models: SwarmModel[]
  gateway: { streams: number; waiting: number; tokens_per_second: number; replays: number; faults: number; moves: number }
}

export interface Point {
  step: number
  loss: number
}

export interface Sample {
  conversation: { role: string; content: string }[]
  reference: string
  before: string
  after: string | null
}

/** tuning.json, of which everything may be absent. */
export interface Tuning {
  status?: string
  error?: string | null
  seconds?: number
  steps?: { done: number; total: number }
  prompt?: { mode: string; tokens: number }
  data?: { source: string }
  settings?: Record<string, unknown>
  curve?: Point[]
  evaluations?: (Point & { perplexity: number })[]
  perplexity?: number | null
  base_perplexity?: number | null
  samples?: Sample[]
}

export interface TuningRun {
  id: string
  name: string
  model: string | null
  tokens: number
  deep: boolean
  prompt_id: string | null
  problem: string | null
  tuning: Tuning | null
}
