// The last gate before HTML enters the page. What a model writes is escaped by markdown.ts already; this allows nothing beyond its marks.
import DOMPurify from 'dompurify'

const ALLOWED = {
  ALLOWED_TAGS:
    'p br hr strong em del a code pre blockquote ul ol li h3 table thead tbody tr th td div span figure figcaption button'.split(' '),
  ALLOWED_ATTR: 'href target rel class start scope tabindex role aria-label data-copy type'.split(' '),
  ALLOW_DATA_ATTR: false,
}

export const sanitize = (html: string): string => DOMPurify.sanitize(html, ALLOWED)
