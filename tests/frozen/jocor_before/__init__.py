"The library before it was rebuilt, to be trained beside the present one"
