const ENTITIES: Record<string, string> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' }

/** Text as HTML that shows it, inside an attribute too. */
export const escape = (text: string): string => text.replace(/[&<>"']/g, (character) => ENTITIES[character]!)
