// Package unwrap looks into wrappers of listeners and connections.
package unwrap

import "reflect"

// Field returns the value of an exported field of the struct v or *v. It is the zero value if
// there is no such field, or if its value is not a T.
func Field[T any](v any, name string) (value T) {
	s := reflect.Indirect(reflect.ValueOf(v))
	if s.Kind() != reflect.Struct {
		return value
	}
	// A longer index leads through an embedded pointer, which may be nil.
	if f, ok := s.Type().FieldByName(name); ok && len(f.Index) == 1 {
		value, _ = s.Field(f.Index[0]).Interface().(T)
	}
	return value
}
