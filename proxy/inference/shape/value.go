package shape

import "bytes"

// Value returns the bytes of the value of key at the top level of a JSON object; the
// last one if there are several. ok is false if the key is absent or the JSON invalid.
func Value(body []byte, key string) (value []byte, ok bool) {
	s := scanner{b: body}
	s.space()
	if s.peek() != '{' {
		return nil, false
	}
	s.i++
	err := s.members(1, func(name []byte, _ bool) (bool, error) {
		if string(name) != key {
			return false, nil
		}
		s.space()
		start := s.i
		if err := s.value(1); err != nil {
			return false, err
		}
		value, ok = body[start:s.i], true
		return true, nil
	})
	return value, ok && err == nil
}

// endWindow is how far from the end of a body endValue looks.
const endWindow = 1 << 10

// endValue is Value for a key that stands near the end of the object, as servers write what
// they know last; quoted is the key in quotes. It reads from the key on only: if the object
// the key is in ends with the body then that is the top level, and the rest of the body, an
// embedding's numbers for example, need not be walked. It says nothing (ok is false) in
// every other case, and whether the JSON before the key is valid it does not know.
func endValue(body []byte, quoted string) (value []byte, ok bool) {
	from := max(0, len(body)-endWindow)
	at := bytes.LastIndex(body[from:], []byte(quoted))
	if at < 0 {
		return nil, false
	}
	at += from
	// A quote inside a string has a backslash before it, one that ends a string has none of
	// these: it is a key.
	if before := bytes.TrimRight(body[:at], " \t\r\n"); len(before) == 0 || before[len(before)-1] != ',' && before[len(before)-1] != '{' {
		return nil, false
	}
	s := scanner{b: body, i: at + len(quoted)}
	s.space()
	if s.peek() != ':' {
		return nil, false
	}
	s.i++
	s.space()
	start := s.i
	if s.value(1) != nil {
		return nil, false
	}
	value = body[start:s.i]
	if s.space(); s.peek() == ',' {
		s.i++
		if s.space(); s.peek() != '"' || s.members(1, nil) != nil {
			return nil, false
		}
	} else if s.peek() != '}' {
		return nil, false
	} else {
		s.i++
	}
	s.space()
	return value, s.i == len(body)
}
