// Markdown that grows: finished blocks are rendered once, only the last one again.
import { Marked, type Token, type Tokens } from 'marked'
import { escape } from './escape.ts'
import { highlight } from './highlight.ts'

const SAFE_LINK = /^(https?:|mailto:|#)/i

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // What a model writes as HTML is shown as it was written.
    html: ({ text }: Tokens.HTML | Tokens.Tag) => escape(text),
    // An image would ask another host for it: it becomes a link with its description.
    image: ({ href, text }: Tokens.Image) => anchor(href, escape(text || href)),
    link({ href, tokens }: Tokens.Link) {
      return anchor(href, this.parser.parseInline(tokens))
    },
    code: ({ text, lang }: Tokens.Code) => {
      const language = (lang ?? '').split(/\s/)[0]!.toLowerCase()
      const label = escape(language || 'text')
      return (
        `<figure class="code"><figcaption><span>${label}</span><button type="button" data-copy="">Copy</button></figcaption>` +
        `<pre tabindex="0" role="region" aria-label="Code, ${label}"><code class="hljs">${highlight(text, language)}</code></pre></figure>\n`
      )
    },
    table(token: Tokens.Table) {
      const row = (cells: Tokens.TableCell[]): string =>
        cells.map((c) => `<${c.header ? 'th scope="col"' : 'td'}>${this.parser.parseInline(c.tokens)}</${c.header ? 'th' : 'td'}>`).join('')
      const body = token.rows.map((cells) => `<tr>${row(cells)}</tr>`).join('')
      return `<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>${row(token.header)}</tr></thead><tbody>${body}</tbody></table></div>\n`
    },
    // Below the message's own heading, and none leaves out a level, whatever the model does: the depth is a matter of looks.
    heading({ tokens, depth }: Tokens.Heading) {
      return `<h3 class="depth-${Math.min(depth, 3)}">${this.parser.parseInline(tokens)}</h3>\n`
    },
    checkbox: ({ checked }: Tokens.Checkbox) => (checked ? '☑ ' : '☐ '),
  },
})

function anchor(href: string, inner: string): string {
  if (!SAFE_LINK.test(href)) return inner
  return `<a href="${escape(href)}" target="_blank" rel="noopener noreferrer nofollow">${inner}</a>`
}

/** HTML of a whole text, not yet sanitized. */
export const render = (text: string): string => GrowingMarkdown.of(text).join('')

/** The blocks of a text that grows at its end. */
export class GrowingMarkdown {
  private source = ''
  private stable = 0 // characters of `source` whose blocks are final
  private readonly finished: string[] = []
  parsed = 0 // characters lexed in all, to show what a frame costs

  static of(text: string): string[] {
    return new GrowingMarkdown().update(text)
  }

  /** HTML of each block of `text`. Where it begins as before, only what follows the last finished block is parsed. */
  update(text: string): string[] {
    const source = text.replace(/\r\n?/g, '\n')
    if (!source.startsWith(this.source.slice(0, this.stable))) {
      this.stable = 0
      this.finished.length = 0
    }
    this.source = source
    const rest = source.slice(this.stable)
    this.parsed += rest.length
    const tokens = marked.lexer(rest)
    const blocks = tokens.filter((token) => token.type !== 'space')
    const last = blocks.at(-1)
    if (!last) return [...this.finished]
    // A block may still grow until another one stands behind it.
    for (const token of tokens.slice(0, tokens.indexOf(last))) {
      this.stable += token.raw.length
      if (token.type !== 'space') this.finished.push(html(token))
    }
    return [...this.finished, html(last)]
  }
}

function html(token: Token): string {
  return marked.parser([token])
}
